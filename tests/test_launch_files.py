"""What `launch/` holds is parsed, checked against its schema, or run with stand-ins for the programs of a cluster."""

from __future__ import annotations

import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vr_jax.errors import EXIT_AGAIN

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def stand_in(folder: Path, name: str, body: str) -> None:
    """A program of a cluster that records how it was called, and then does what the body says."""
    path = folder / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$(printf "%q " {name} "$@")" >> "$CALLS"\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of stand-ins in front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return folder


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def calls(folder: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (folder.parent / "calls").read_text().splitlines()]


def test_every_file_says_how_to_start_it_and_what_to_change():
    files = {path.name for path in LAUNCH.iterdir()}
    assert files == {"local.sh", "slurm.sh", "tpu_vm.sh", "gke_jobset.yaml", "skypilot.yaml"}
    for name in files:
        head = (LAUNCH / name).read_text()[:1200]
        assert "# Start:" in head
        assert "# Change:" in head


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=True).stderr == b""
    assert os.access(script, os.X_OK)


def test_the_local_script_launches(cluster):
    stand_in(cluster, "vr-jax", "exit 0")
    assert run("local.sh", "--config=a b.py", "--workdir=runs/x", PROCESSES="2").returncode == 0
    assert calls(cluster) == [
        ["vr-jax", "launch", "--processes=2", "--restarts=3", "--", "train", "--config=a b.py", "--workdir=runs/x"]
    ]


def test_the_slurm_script_asks_for_what_sbatch_knows():
    lines = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    options = dict(line.partition("=")[::2] for line in lines)
    assert set(options) == {
        *("--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal", "--requeue"),
        *("--open-mode", "--output"),
    }
    assert options["--ntasks-per-node"] == options["--gpus-per-node"]  # JAX gives each task one GPU
    assert options["--signal"] == "TERM@300"
    assert options["--requeue"] == ""


@pytest.mark.parametrize(
    ("code", "count", "requeued"),
    [(0, 0, False), (2, 0, False), (1, 3, False), (75, 0, True), (137, 4, True), (75, 100, False)],
)
def test_the_slurm_script_queues_again_what_may_continue(cluster, code, count, requeued):
    stand_in(cluster, "srun", f"exit {code}")
    stand_in(cluster, "scontrol", "exit 0")
    done = run("slurm.sh", "--config=c.py", "--workdir=w x", SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(count))
    assert done.returncode == code
    first, *rest = calls(cluster)
    assert first[0] == "srun"
    assert first[3:] == ["vr-jax", "train", "--distributed", "--config=c.py", "--workdir=w x"]
    assert rest == ([["scontrol", "requeue", "7"]] if requeued else [])
    assert len(done.stdout.splitlines()) == 1


# Starts a task for each number as Slurm does, kills task 1 after its first update, and returns the highest exit code.
SRUN = r"""
shift 2
export SLURM_JOB_ID=7 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_LOCALID=0
for task in 0 1; do
    SLURM_PROCID=$task "$@" & pids[task]=$!
done
until [ -s "$METRICS" ]; do sleep 0.1; done
kill -9 "${pids[1]}"
highest=0
for task in 0 1; do
    wait "${pids[task]}"; code=$?
    [ "$code" -gt "$highest" ] && highest=$code
done
exit "$highest"
"""


@pytest.mark.slow  # two processes train: about half a minute
def test_tasks_of_slurm_find_each_other_and_a_killed_one_queues_the_job_again(cluster, tmp_path):
    from benchmarks.hosts.launched import environment, train_command

    stand_in(cluster, "srun", SRUN)
    stand_in(cluster, "scontrol", "exit 0")
    stand_in(cluster, "vr-jax", f'exec {sys.executable} -m vr_jax "$@"')
    command = train_command(tmp_path / "run", processes=2, steps=100_000, every=1000)
    done = run("slurm.sh", *command[1:], **{**environment(), "METRICS": str(tmp_path / "run" / "metrics.jsonl")})
    assert done.returncode == 128 + signal.SIGKILL
    assert ["scontrol", "requeue", "7"] in calls(cluster)
    assert "process 1 of 2 on" in done.stderr
    assert "is lost: it has ended without a word" in done.stderr


@pytest.mark.parametrize(
    ("codes", "status", "said"),
    [
        ([0], 0, "done (0 restarts)"),
        ([75, 255, 137, 0], 0, "done (3 restarts)"),
        ([75, 2], 2, "exit code 2 has to be mended first"),
        ([75, 75, 75], 75, "given up after 2 restarts"),
    ],
)
def test_the_script_for_tpu_vms_starts_again_what_may_continue(cluster, tmp_path, codes, status, said):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    stand_in(cluster, "gcloud", f'f={tmp_path}/codes; code=$(head -n 1 "$f"); sed -i 1d "$f"; exit "$code"')
    settings = {"POD": "pod", "ZONE": "zone", "PAUSE": "0", "RESTARTS": "3" if 0 in codes else "2"}
    done = run("tpu_vm.sh", "--config=c.py", "--workdir=w x", **settings)
    assert done.returncode == status
    assert said in done.stdout + done.stderr
    found = calls(cluster)
    assert len(found) == len(codes)
    assert found[0][:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone"]
    assert found[0][7] == "--worker=all"
    remote = found[0][8].removeprefix("--command=").partition(" && ")[2]
    assert shlex.split(remote) == ["vr-jax", "train", "--distributed", "--config=c.py", "--workdir=w x"]


def test_the_script_for_tpu_vms_creates_a_pod_where_it_is_asked(cluster):
    stand_in(cluster, "gcloud", "exit 0")
    assert run("tpu_vm.sh", POD="pod", ZONE="zone", CREATE="1", TYPE="v5litepod-32").returncode == 0
    assert calls(cluster)[0][4:7] == ["create", "pod", "--zone=zone"]
    assert "--accelerator-type=v5litepod-32" in calls(cluster)[0]
    missing = run("tpu_vm.sh", ZONE="zone")
    assert missing.returncode != 0
    assert "POD: give the name of the pod" in missing.stderr


def fields(value: object, where: str = "") -> set[str]:
    """The dotted names of all fields; those of lists carry no number, and those below `limits` are left out."""
    if isinstance(value, dict):
        inner = {name for key, one in value.items() for name in fields(one, f"{where}.{key}".strip("."))}
        return inner or {where}
    if isinstance(value, list):
        return {name for one in value for name in fields(one, where)} or {where}
    return {where}


JOB = "spec.replicatedJobs.template.spec"
POD = f"{JOB}.template.spec"
# Of the schema of JobSet (jobset.x-k8s.io/v1alpha2) and of Kubernetes, what the manifest uses.
KNOWN = {
    *("apiVersion", "kind", "metadata.name", "metadata.annotations.alpha.jobset.sigs.k8s.io/exclusive-topology"),
    *(f"spec.failurePolicy.{name}" for name in ("maxRestarts", "rules.name", "rules.action")),
    "spec.failurePolicy.rules.onJobFailureReasons",
    *("spec.replicatedJobs.name", "spec.replicatedJobs.replicas"),
    *(f"{JOB}.{name}" for name in ("parallelism", "completions", "completionMode", "backoffLimit")),
    *(f"{JOB}.podFailurePolicy.rules.{name}" for name in ("action", "onExitCodes.containerName")),
    *(f"{JOB}.podFailurePolicy.rules.onExitCodes.{name}" for name in ("operator", "values")),
    *(f"{POD}.{name}" for name in ("restartPolicy", "terminationGracePeriodSeconds", "hostNetwork", "dnsPolicy")),
    *(f"{POD}.nodeSelector.cloud.google.com/gke-tpu-{name}" for name in ("accelerator", "topology")),
    *(f"{POD}.containers.{name}" for name in ("name", "image", "command", "args", "env.name", "env.value")),
    f"{POD}.containers.resources.limits.google.com/tpu",
    *(f"{POD}.containers.volumeMounts.{name}" for name in ("name", "mountPath")),
    *(f"{POD}.volumes.{name}" for name in ("name", "persistentVolumeClaim.claimName")),
}


def test_the_jobset_restarts_all_hosts_but_for_what_has_to_be_mended():
    manifest = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert fields(manifest) == KNOWN
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (slice_,) = manifest["spec"]["replicatedJobs"]
    job = slice_["template"]["spec"]
    assert job["backoffLimit"] == 0  # one lost host fails the job, which restarts all
    assert job["parallelism"] == job["completions"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    temporary = rule["onExitCodes"]["values"]
    assert temporary == sorted(temporary)
    assert {EXIT_AGAIN, 128 + signal.SIGKILL, 128 + signal.SIGTERM, 128 + signal.SIGABRT} <= set(temporary)
    assert not {0, 1, 2, 3, 4} & set(temporary)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy needs
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    check_command(" ".join(container["args"]))


def test_the_task_of_skypilot_recovers_after_75():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_AGAIN]
    environment = {
        **os.environ,
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    shown = task["run"].replace("exec vr-jax", "printf '%s\\n' vr-jax")
    words = subprocess.run(["bash", "-c", shown], env=environment, capture_output=True, text=True, check=True).stdout
    assert words.split("\n")[2:5] == ["--coordinator=10.0.0.1:8476", "--num_processes=2", "--process_id=1"]
    check_command(shlex.join(words.split()))


def check_command(text: str) -> None:
    """The flags of a command are those of `vr-jax train`, and its config file exists."""
    from vr_jax.cli.flags import parse
    from vr_jax.cli.train import TrainFlags

    words = shlex.split(text.removeprefix("exec "))
    assert words[:2] == ["vr-jax", "train"]
    flags = parse(TrainFlags, words[2:])
    assert (ROOT / flags.config.partition(":")[0]).exists()
