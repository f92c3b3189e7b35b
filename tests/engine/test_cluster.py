"""Ranks read from the environments of torchrun and SLURM, and what a run notes of its environment."""

from __future__ import annotations

import pytest

from mtl_rcnn.engine.cluster import Place, expand_hosts, find_place, step_port, without_step
from mtl_rcnn.engine.run import redacted
from mtl_rcnn.errors import ConfigError

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
BATCH = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "70",
    "SLURM_JOB_NODELIST": "n[08-9]",
}
TASK = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[08-09]",
    "SLURM_STEP_ID": "2",
}
"""Variables of a batch script, and of task 3 of a step that it starts on two nodes."""


@pytest.mark.parametrize(
    ("cluster", "environ", "place"),
    [
        ("local", {}, Place(0, 1, 0)),
        ("local", BATCH, Place(0, 1, 0)),
        ("local", {**TASK, "SLURM_STEP_NUM_TASKS": "1"}, Place(0, 1, 0)),
        ("local", TORCHRUN, Place(3, 4, 1, "a", 29500)),
        ("local", {**TASK, **TORCHRUN}, Place(3, 4, 1, "a", 29500)),
        ("local", without_step(TASK), Place(0, 1, 0)),
        ("slurm", TASK, Place(3, 4, 1, "n08", 21122)),
        ("slurm", {**TASK, "MASTER_ADDR": "ib0", "MASTER_PORT": "5"}, Place(3, 4, 1, "ib0", 5)),
        ("slurm", {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Place(0, 1, 0)),
    ],
)
def test_a_place_is_read(cluster: str, environ: dict[str, str], place: Place) -> None:
    assert find_place(cluster, environ) == place


@pytest.mark.parametrize(
    ("cluster", "environ", "said"),
    [
        ("local", TASK, r"srun started 4 tasks \(SLURM_STEP_NUM_TASKS=4\), each of .*; add cluster=slurm"),
        ("slurm", {}, "SLURM_PROCID, SLURM_STEP_NUM_TASKS, .* not set: this process is not a task of srun"),
        (
            "slurm",
            BATCH,
            "SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, SLURM_STEP_ID not set: this .* is not a task of srun",
        ),
        ("slurm", {**TASK, **TORCHRUN}, "RANK is set, so torchrun started this process; use cluster=local"),
        ("slurm", {**TASK, "SLURM_PROCID": "x"}, "SLURM_PROCID='x' is not a whole number"),
        ("slurm", {**TASK, "MASTER_PORT": "auto"}, "MASTER_PORT='auto' is not a whole number"),
        (
            "slurm",
            {**TASK, "SLURM_STEP_NODELIST": "n[1-2"},
            r"cannot read the SLURM node list 'n\[1-2'; set MASTER_ADDR",
        ),
        ("mpi", TASK, "cluster.kind=mpi: expected local or slurm"),
    ],
)
def test_an_environment_that_names_no_place_is_told(cluster: str, environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_place(cluster, environ)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu7", ["gpu7"]),
        ("n[08-10,12]", ["n08", "n09", "n10", "n12"]),
        ("a[1-2],b,c[3]", ["a1", "a2", "b", "c3"]),
        ("rack[0-1]node[2-3]", ["rack0node2", "rack0node3", "rack1node2", "rack1node3"]),
        ("10.0.0.[9-10]", ["10.0.0.9", "10.0.0.10"]),
    ],
)
def test_a_node_list_is_expanded_in_order(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-2", "n[]", "n[2-1]", "n[a-b]", "n1-2]"])
def test_a_node_list_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="node list"):
        expand_hosts(text)


def test_ports_of_neighbours_differ_and_are_of_one_range() -> None:
    ports = [step_port(job, step) for job in range(90_000, 90_625) for step in range(16)]
    assert len(set(ports)) == len(ports)
    assert set(ports) == set(range(20000, 30000))
    assert step_port(2**31, 4294967290) in range(20000, 30000)  # an interactive step has a special id


def test_secrets_are_not_noted() -> None:
    secrets = {
        **dict.fromkeys(
            ("WANDB_API_KEY", "HF_TOKEN", "db_password", "AWS_SECRET_ACCESS_ID", "PG_PWD", "GH_AUTH"), "s3cr3t"
        ),
        "HTTPS_PROXY": "http://me:s3cr3t@proxy:3128",
        "OPTIONS": "--login hf_s3cr3t --quiet",
    }
    plain = {"PATH": "/bin:/usr/bin", "PWD": "/home/me", "SLURM_JOB_ID": "7", "NCCL_SOCKET_IFNAME": "ib0"}
    noted = redacted({**secrets, **plain})
    assert noted.keys() == {**secrets, **plain}.keys()
    assert "s3cr3t" not in str(noted)
    assert noted["HTTPS_PROXY"] == "http://<redacted>@proxy:3128"
    assert noted["OPTIONS"] == "--login <redacted> --quiet"
    assert {name: noted[name] for name in plain} == plain
