"""The files in cluster/: their commands and settings, parsed; the Slurm files run with a stub of
srun. benchmarks/slurm_preemption.py runs cluster/slurm.sbatch under a real Slurm.

    uv run --with skypilot==0.14.1 pytest tests/test_cluster.py

SkyPilot is not in the development group: it would downgrade packages that this project needs
(click). Without it, the tests of its files are skipped.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import data_prep
from finetune import FinetuneConfig
from pretrain import PretrainConfig
from training.config import load_config

CLUSTER = ROOT / "cluster"
FILES = sorted(CLUSTER.iterdir())
CONFIGS = {"pretrain.py": PretrainConfig, "finetune.py": FinetuneConfig}
PLAIN_OPTIONS = {  # of sbatch, which the files may set
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task"),
    *("mem", "mem-per-cpu", "exclusive", "time", "signal", "requeue", "open-mode", "output"),
}
STUB_SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.txt
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
STUB_SCONTROL = """#!/bin/bash
echo "$@" > scontrol.txt
"""
STUB_PYTHON = """#!/bin/bash
printf '%s\\n' "$@" > arguments.txt
env > environment.txt
exit ${STUB_CODE:-0}
"""


def header_of(path: Path) -> str:
    """Return the comment at the head of a file, without its marks."""
    lines = path.read_text().removeprefix("#!/bin/bash\n").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def commands_of(path: Path) -> list[list[str]]:
    """Return the commands in the header of a file, or in a page."""
    text = header_of(path) if path.parent == CLUSTER else path.read_text()
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^ *((?:sbatch|sky|kubectl|python) .*)$", text, re.M)
    return [shlex.split(line, comments=True) for line in lines]


def check_stage(words: list[str]) -> None:
    """Raise ValueError or SystemExit unless a stage takes these arguments."""
    script, *arguments = words
    if script in CONFIGS:
        load_config(arguments, CONFIGS[script])
    elif script == "data_prep.py":
        data_prep.parse(arguments)
    else:
        raise ValueError(f"{script} is no stage that a cluster runs")


def settings(name: str) -> dict[str, str]:
    """Return the #SBATCH options of a file."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (CLUSTER / name).read_text(), re.M)
    return dict(lines)


def run_script(
    name: str, folder: Path, *arguments: str, code: int = 0, **variables: str
) -> subprocess.CompletedProcess:
    """Run a Slurm file in a folder, with stubs of srun, of scontrol and of Python."""
    stubs = {
        "bin/srun": STUB_SRUN,
        "bin/scontrol": STUB_SCONTROL,
        ".venv/bin/python": STUB_PYTHON,
    }
    for path, text in stubs.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        (folder / path).chmod(0o755)
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "STUB_CODE": str(code)}
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NAME": "vicmae", "SLURM_CPUS_PER_TASK": "12"}
    return subprocess.run(
        ["bash", str(CLUSTER / name), *arguments],
        cwd=folder,
        env=environment | slurm | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def rank_variables(rank: int) -> dict[str, str]:
    """Return what Slurm sets for a task of two nodes with eight tasks each."""
    return {
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 8),
        "SLURM_NODEID": str(rank // 8),
    }


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_header_gives_purpose_command_and_what_to_edit(path):
    header = header_of(path)
    assert re.match(r"[A-Z][^\n]+\n\n  \S", header)
    assert f"cluster/{path.name}" in header and "\nEdit: " in header
    assert all(len(line) <= 100 for line in lines_of(path))


@pytest.mark.parametrize("path", [*FILES, ROOT / "docs" / "cluster.md"], ids=lambda path: path.name)
def test_every_stage_in_a_shown_command_takes_its_arguments(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands_of(path)
    assert found
    for words in found:
        if words[0] == "python":
            check_stage(words[1:])
        for number, word in enumerate(words):
            if word == "cluster/slurm.sbatch" and words[number + 1 :]:
                check_stage(words[number + 1 :])
            if word == "cluster/data_prep.sbatch":
                check_stage(["data_prep.py", *words[number + 1 :]])
            if word.startswith("RUN="):
                check_stage(word.removeprefix("RUN=").split())


@pytest.mark.parametrize("name", ["slurm.sbatch", "data_prep.sbatch"])
def test_slurm_files_are_bash_and_set_known_options(name):
    subprocess.run(["bash", "-n", str(CLUSTER / name)], check=True)
    lines = [line for line in lines_of(CLUSTER / name) if line.startswith("#SBATCH")]
    given = settings(name)
    assert len(given) == len(lines) and given.keys() <= PLAIN_OPTIONS
    assert "requeue" in given and given["open-mode"] == "append"


def test_training_job_asks_for_the_early_signal_that_it_tells_the_run(tmp_path, monkeypatch):
    """The signal goes to the ranks (no B:), and the configuration knows the key and the signal."""
    monkeypatch.chdir(ROOT)
    name = re.fullmatch(r"(USR[12])@\d+", settings("slurm.sbatch")["signal"])[1]
    run_script("slurm.sbatch", tmp_path, **rank_variables(0))
    script, *arguments = lines_of(tmp_path / "arguments.txt")
    config = load_config(arguments, CONFIGS[script])
    assert config["checkpoints"]["stop_signals"] == [f"SIG{name}"]
    assert arguments[0] == "yamls/vitl.yaml"


@pytest.mark.parametrize("rank", [0, 11])
def test_each_task_is_the_rank_that_slurm_gives_it(tmp_path, rank):
    run_script("slurm.sbatch", tmp_path, "pretrain.py", "a b.yaml", **rank_variables(rank))
    environment = dict(line.split("=", 1) for line in lines_of(tmp_path / "environment.txt"))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
    found = [int(environment[name]) for name in names]
    assert found == [rank, 16, rank % 8, 8, rank // 8]
    assert found[0] == found[4] * found[3] + found[2]
    assert environment["MASTER_ADDR"] == os.uname().nodename
    assert 1024 < int(environment["MASTER_PORT"]) < 65536
    assert lines_of(tmp_path / "arguments.txt")[:2] == ["pretrain.py", "a b.yaml"]
    assert (tmp_path / "vicmae-41234-rank11.out").exists() == (rank == 11)


def test_tasks_are_laid_out_by_node_and_may_end_after_one_another(tmp_path):
    run_script("slurm.sbatch", tmp_path, **rank_variables(0))
    options = lines_of(tmp_path / "srun.txt")
    assert {"--distribution=block", "--kill-on-bad-exit=0", "--cpus-per-task=12"} <= {*options}


@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, False), (75, True), (138, True), (143, False)]
)
def test_training_queues_again_after_an_interruption_but_not_after_an_error(
    tmp_path, code, requeued
):
    done = run_script("slurm.sbatch", tmp_path, code=code, **rank_variables(0))
    assert done.returncode == code
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert lines_of(tmp_path / "scontrol.txt") == ["requeue 41234"]


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "16",
    "SLURM_ARRAY_TASK_COUNT": "16",
}


def test_task_of_an_array_converts_its_part_and_merge_has_none(tmp_path):
    run_script("data_prep.sbatch", tmp_path, "k400", "raw", "out", **ARRAY)
    script, *arguments = lines_of(tmp_path / "arguments.txt")
    parsed = data_prep.parse(arguments)
    assert (script, parsed.share, parsed.workers) == ("data_prep.py", (3, 16), 12)
    run_script("data_prep.sbatch", tmp_path, "merge", "out")
    assert lines_of(tmp_path / "arguments.txt") == ["data_prep.py", "merge", "out"]


def test_array_of_some_of_its_tasks_is_refused(tmp_path):
    some = ARRAY | {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    done = run_script("data_prep.sbatch", tmp_path, "k400", "raw", "out", **some)
    assert done.returncode == 2 and "--array must be 1-N" in done.stderr
    assert not (tmp_path / "arguments.txt").exists()


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(75, 9, True), (1, 2, True), (1, 3, False), (0, 0, False)]
)
def test_part_is_repeated_alone_and_not_for_ever(tmp_path, code, restarts, requeued):
    again = {"SLURM_RESTART_COUNT": str(restarts)}
    run_script("data_prep.sbatch", tmp_path, "k400", "raw", "out", code=code, **ARRAY, **again)
    assert (tmp_path / "scontrol.txt").exists() == requeued


def check_bash(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def last_words(script: str, variables: dict[str, str]) -> list[str]:
    """Return the arguments from the stage on that a script gives to the launcher."""
    command = re.search(r"exec python -m training.launch .*", script, re.S)[0].replace("\\\n", " ")
    for name, value in variables.items():
        command = command.replace(f"${name}", value)
    words = shlex.split(command)
    start = next(number for number, word in enumerate(words) if word.endswith(".py"))
    return words[start:]


def test_kubernetes_objects_have_only_fields_that_kubernetes_knows():
    client = pytest.importorskip("kubernetes.client")
    kinds = {"Service": client.V1Service, "Job": client.V1Job}
    documents = list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    api = client.ApiClient()
    for document in documents:
        kind = kinds[document["kind"]]
        assert api.sanitize_for_serialization(kind.from_dict(document)) == document
        misspelt = json.loads(json.dumps(document)) | {"sepc": {}}
        assert api.sanitize_for_serialization(kind.from_dict(misspelt)) != misspelt


def test_kubernetes_job_retries_interruptions_and_agrees_with_itself(monkeypatch):
    monkeypatch.chdir(ROOT)
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    codes, conditions = spec["podFailurePolicy"]["rules"]
    assert codes["action"] == conditions["action"] == "Ignore"
    assert codes["onExitCodes"]["values"] == [75]
    assert codes["onExitCodes"]["containerName"] == container["name"]
    nodes = {
        str(spec["completions"]),
        str(spec["parallelism"]),
        *(env["value"] for part in (container, *pod["initContainers"]) for env in part["env"][:1]),
    }
    assert len(nodes) == 1
    gpus = {env["name"]: env.get("value") for env in container["env"]}["GPUS"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    names = {job["metadata"]["name"], service["metadata"]["name"], pod["subdomain"]}
    assert names == {service["spec"]["selector"]["job-name"]}
    address = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    bash, _, script, _, *stage = container["command"]
    assert bash == "bash" and f"--master_addr {address} " in script
    check_bash(script)
    check_bash(pod["initContainers"][0]["command"][2])
    check_stage(stage)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", ["skypilot.yaml", "data_prep.skypilot.yaml"])
def test_skypilot_takes_its_files(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # SkyPilot keeps files there
    monkeypatch.chdir(ROOT)
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(CLUSTER / name))
    (resources,) = task.resources
    recovery = resources.job_recovery
    assert resources.use_spot and recovery["recover_on_exit_codes"] == [75]
    assert len(task.storage_mounts) == 1


def test_skypilot_jobs_start_stages_with_arguments_that_they_take(monkeypatch):
    monkeypatch.chdir(ROOT)
    task = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
    check_bash(task["setup"])
    check_bash(task["run"])
    stage = last_words(task["run"], task["envs"])
    check_stage(stage)
    assert stage[-2] == f"checkpoints.bucket={task['envs']['CHECKPOINTS']}"
    task = yaml.safe_load((CLUSTER / "data_prep.skypilot.yaml").read_text())
    check_bash(task["run"])
    command = task["run"].strip()
    for name, value in task["envs"].items():
        command = command.replace(f"${name}", value)
    check_stage(shlex.split(command)[2:])
