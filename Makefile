# `make` alone prints this help.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup slurm demo test lint clean

help: ## print this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## make .venv and install everything into it (again only when requirements change)

$(STAMP): requirements.txt setup.py $(wildcard third_party/detectron2/*.toml third_party/detectron2/detectron2_backend/*.py)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) tools/setup_environment.py
	touch $(STAMP)

slurm: ## the daemons of the tests that start a SLURM cluster, by apt-get as root; without them these tests are skipped
	@if command -v slurmctld munged >/dev/null; then echo "SLURM is installed"; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } \
			|| echo "apt-get could not install SLURM: tests of SLURM will be skipped"; \
	else echo "SLURM is not installed, and this is not root with apt-get: tests of SLURM will be skipped"; fi

demo: setup ## the main job on generated scenes: train, evaluate, export, predict (outputs/demo, about 12 minutes on 2 cores)
	$(RUN) tools/demo.py

test: setup ## all tests
	$(RUN) -m pytest -n 2 --dist worksteal

lint: setup ## style and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean: ## remove what builds and runs left here, not .venv and not outputs/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
