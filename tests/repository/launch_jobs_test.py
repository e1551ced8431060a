"""The launchers of jobs: what they start, with real local processes for GPUs, Slurm, TPUs and pods."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from checkout import ROOT

from elm_jax.runtime import hosts

LAUNCH = ROOT / "launch"
SCRIPTS = ("gpu.sh", "tpu_pod.sh", "slurm.sbatch", "jobset.sh")
OPTIONS = {"tpu_pod.sh": ["-t", "slice", "-z", "zone"], "jobset.sh": ["-i", "image"]}
TRICKY = ["--gin_file", "experts/prompt.gin", "--gin.MODEL_DIR='runs/a & \"b\"'"]
# Stands for elm: writes its words and its environment, then ends as the test wants.
ELM = """#!/usr/bin/env python3
import json, os, signal, sys, time
if os.environ.get("SLOW"):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
folder = os.environ["SEEN"]
number = len(os.listdir(folder))
with open(f"{folder}/{os.getpid()}.tmp", "w") as file:
    json.dump({"words": sys.argv[1:], "env": dict(os.environ)}, file)
os.rename(f"{folder}/{os.getpid()}.tmp", f"{folder}/{os.getpid()}.json")
time.sleep(float(os.environ.get("SLOW", 0)))
statuses = os.environ.get("STATUSES", "0").split(",")
sys.exit(int(statuses[min(number, len(statuses) - 1)]))
"""
# srun: the tasks of a step, each with what Slurm tells it.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$SEEN.calls"
while [[ "$1" == --* ]]; do shift; done
for i in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_PROCID=$i SLURM_LOCALID=0 SLURM_STEP_ID=0 \\
    SLURM_STEP_NODELIST="$SLURM_JOB_NODELIST" SLURM_STEP_TASKS_PER_NODE="1(x$SLURM_NTASKS)" "$@" &
done
trap 'kill -TERM $(jobs -p)' TERM
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""
# gcloud ... ssh: the command on both hosts of a slice.
GCLOUD = """#!/usr/bin/env bash
echo "gcloud $*" >> "$SEEN.calls"
command="${@: -1}"
cd "$HOSTS_HOME"
for i in 0 1; do bash -c "$command" & done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a launcher; gives its process, what every `elm` saw, and the calls of other programs."""
    tools, seen = tmp_path / "tools", tmp_path / "seen"
    for folder in (tools, seen, tmp_path / "venv" / "bin", tmp_path / "home"):
        folder.mkdir(parents=True)
    (tmp_path / "home" / "elm_jax").symlink_to(ROOT)
    log = '#!/usr/bin/env bash\necho "{0} $*" >> "$SEEN.calls"\n'
    programs = {tools / "srun": SRUN, tools / "gcloud": GCLOUD, tools / "scontrol": log.format("scontrol"),
                tools / "kubectl": log.format("kubectl") + 'cat > "$SEEN.manifest"\n',
                tmp_path / "venv" / "bin" / "elm": ELM,
                tmp_path / "venv" / "bin" / "python": log.format("python")}
    for path, text in programs.items():
        path.write_text(text)
        path.chmod(0o755)

    def run(script, *words, status=0, wait=True, **env):
        for old in seen.iterdir():
            old.unlink()
        (tmp_path / "seen.calls").write_text("")
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("SLURM_", "ELM_", "CUDA_"))}
        process = subprocess.Popen(
            ["bash", LAUNCH / script, *map(str, words)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=ROOT,
            env={**kept, "PATH": f"{tools}:{os.environ['PATH']}", "ELM_VENV": str(tmp_path / "venv"),
                 "SEEN": str(seen), "HOSTS_HOME": str(tmp_path / "home"), **env})
        if not wait:
            return process
        out, err = process.communicate(timeout=60)
        assert process.returncode == status, err
        return out, err

    run.seen = lambda: [json.loads(path.read_text()) for path in sorted(seen.glob("*.json"))]
    run.calls = lambda: (tmp_path / "seen.calls").read_text().splitlines()
    run.manifest = tmp_path / "seen.manifest"
    return run


def places(seen):
    """Where each process would find itself, by the program's own reading of its environment."""
    found = [hosts.place_of(None, None, None, one["env"]) for one in seen]
    return sorted(found, key=lambda place: place.process_id)


@pytest.mark.skipif(not shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:"
                                     f"{os.environ['PATH']}"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    scripts = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"])
    done = subprocess.run([program, "-x", "-P", LAUNCH, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_explains_itself(launch, script):
    out, _ = launch(script, "-h")
    assert {"Jobs:", "Options:", "expert", "stack", "farm", "dry run"} <= set(re.findall(
        r"Jobs:|Options:|expert|stack|farm|dry run", out))
    assert "#SBATCH" not in out and "set -euo" not in out and not launch.seen() and not launch.calls()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_and_runs_nothing(launch, script):
    out, _ = launch(script, *OPTIONS.get(script, []), "-n", "stack", *TRICKY)
    assert "prompt_stack.gin" in out and "runs/a" in out
    assert not launch.seen() and not launch.calls()
    if script in ("gpu.sh", "slurm.sbatch"):
        assert shlex.split(out)[-6:] == ["train", "--gin_file", "experts/prompt_stack.gin", *TRICKY]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_job_is_status_2(launch, script):
    _, err = launch(script, *OPTIONS.get(script, []), "exprt", status=2)
    assert "unknown job 'exprt'" in err and not launch.seen()


def test_one_expert_on_one_gpu_host(launch):
    launch("gpu.sh", "expert", *TRICKY)
    (one,) = launch.seen()
    assert one["words"] == ["train", *TRICKY]
    assert one["env"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92" and "CUDA_VISIBLE_DEVICES" not in one["env"]
    assert any("pip install" in call and ".[gpu]" in call for call in launch.calls())


def test_processes_of_one_run_share_a_gpu_host(launch):
    launch("gpu.sh", "-p", 2, "expert", *TRICKY, CUDA_VISIBLE_DEVICES="4,5,6,7", ELM_NO_INSTALL="1")
    first, second = places(launch.seen())
    assert (first.process_id, second.process_id, first.num_processes) == (0, 1, 2)
    assert first.coordinator_address == second.coordinator_address
    gpus = {one["env"]["ELM_PROCESS_ID"]: one["env"]["CUDA_VISIBLE_DEVICES"] for one in launch.seen()}
    assert gpus == {"0": "4,5", "1": "6,7"} and not launch.calls()


def test_workers_of_a_farm_share_a_gpu_host(launch):
    launch("gpu.sh", "-w", 3, "farm", "farms/p3", "--attempts", 2, CUDA_VISIBLE_DEVICES="0,1,2",
           ELM_NO_INSTALL="1")
    assert [one["words"] for one in launch.seen()] == 3 * [
        ["farm", "work", "--dir", "farms/p3", "--attempts", "2"]]
    assert sorted(one["env"]["CUDA_VISIBLE_DEVICES"] for one in launch.seen()) == ["0", "1", "2"]
    assert all(hosts.place_of(None, None, None, one["env"]) is None for one in launch.seen())
    launch("gpu.sh", "-w", 3, "expert", status=2)


@pytest.mark.parametrize(("statuses", "ends", "starts"), [
    ("143,75,0", 0, 3), ("2", 2, 1), ("1", 1, 1), ("137", 137, 3)])
def test_it_starts_again_what_is_worth_it(launch, statuses, ends, starts):
    launch("gpu.sh", "-r", 2, "expert", STATUSES=statuses, ELM_NO_INSTALL="1", status=ends)
    assert len(launch.seen()) == starts


def terminate_when_started(launch, process, count):
    end = time.monotonic() + 60
    while len(launch.seen()) < count:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    return process.returncode


def test_sigterm_goes_on_to_elm_and_is_no_reason_to_start_again(launch):
    process = launch("gpu.sh", "-p", 2, "-r", 5, "expert", wait=False, SLOW="60", ELM_NO_INSTALL="1")
    assert terminate_when_started(launch, process, 2) == 143
    assert len(launch.seen()) == 2


SLURM = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[007-008],other",
         "ELM_NO_INSTALL": "1", "SLURM_SUBMIT_DIR": str(ROOT)}


def test_the_tasks_of_a_slurm_job_find_each_other(launch):
    launch("slurm.sbatch", "expert", *TRICKY, **SLURM)
    assert [one["words"] for one in launch.seen()] == 2 * [["train", *TRICKY]]
    first, second = places(launch.seen())
    assert first == hosts.Place(f"node007:{4242 % 4096 + 61440}", 2, 0)
    assert second == hosts.Place(first.coordinator_address, 2, 1)
    assert [call.split()[0] for call in launch.calls()] == ["srun"]


@pytest.mark.parametrize(("status", "before", "requeued"), [
    (143, 0, True), (75, 3, True), (2, 0, False), (143, 20, False), (0, 0, False)])
def test_a_slurm_job_is_queued_again_if_that_helps(launch, status, before, requeued):
    launch("slurm.sbatch", "farm", "farms/p3", STATUSES=str(status), status=status,
           **{**SLURM, "SLURM_NTASKS": "1", "SLURM_RESTART_COUNT": str(before)})
    assert ("scontrol requeue 4242" in launch.calls()) == requeued
    assert [one["words"] for one in launch.seen()] == [["farm", "work", "--dir", "farms/p3"]]


def test_slurm_asks_for_time_to_save():
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert "#SBATCH --signal=TERM@180" in text and "#SBATCH --requeue" in text
    assert "#SBATCH --ntasks-per-node=1" in text


def test_all_hosts_of_a_tpu_slice_run_the_same(launch):
    launch("tpu_pod.sh", "-t", "slice", "-z", "zone", "expert", *TRICKY)
    assert [one["words"] for one in launch.seen()] == 2 * [["train", *TRICKY]]
    call = next(call for call in launch.calls() if call.startswith("gcloud"))
    assert call.startswith("gcloud compute tpus tpu-vm ssh slice --zone zone --worker all --command ")
    assert any(".[tpu]" in call for call in launch.calls())


def test_every_slice_is_a_worker_of_a_farm_and_starts_again_alone(launch):
    launch("tpu_pod.sh", "-t", "a,b", "-z", "zone", "-r", 1, "farm", "/mnt/farm", STATUSES="0,0,143,0")
    slices = [call.split()[5] for call in launch.calls() if call.startswith("gcloud")]
    assert sorted(set(slices)) == ["a", "b"] and len(slices) == 3
    assert len(launch.seen()) == 6
    launch("tpu_pod.sh", "-t", "a,b", "-z", "zone", "expert", status=2)


def jobset(launch, *options):
    out, _ = launch("jobset.sh", "-i", "image:1", *options, "-n", "farm", "/share/farm", *TRICKY)
    assert launch.calls() == []
    return yaml.safe_load(out)


def test_a_jobset_names_its_processes(launch):
    manifest = jobset(launch, "-j", "p3", "-w", 3, "-p", 4, "-a", "google.com/tpu=4", "-v", "share",
                      "-s", "cloud.google.com/gke-tpu-topology=4x4")
    (hosts_of,) = manifest["spec"]["replicatedJobs"]
    job, pod = hosts_of["template"]["spec"], hosts_of["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (hosts_of["replicas"], job["parallelism"], job["completions"]) == (3, 4, 4)
    assert container["command"] == ["elm"]
    assert container["args"] == ["farm", "work", "--dir", "/share/farm", *TRICKY]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-topology": "4x4"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "share"}
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    told = {"ELM_WORKER": "2", "ELM_PROCESS_ID": "3"}  # what Kubernetes fills in from labels
    assert {name for name, value in env.items() if value is None} == set(told)
    filled = {name: (value or told[name]).replace("$(ELM_WORKER)", "2") for name, value in env.items()}
    assert hosts.place_of(None, None, None, filled) == hosts.Place("p3-hosts-2-0.p3:8476", 4, 3)
    assert manifest["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": "p3"}


def test_a_jobset_is_made_anew_after_a_stop_but_not_after_wrong_input(launch):
    job = jobset(launch, "-r", 5, "-p", 2)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 10 and job["template"]["spec"]["restartPolicy"] == "Never"
    wrong, evicted = job["podFailurePolicy"]["rules"]
    assert wrong["action"] == "FailJob" and wrong["onExitCodes"]["values"] == [2]
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_a_jobset_is_applied_as_it_is_shown(launch):
    out, _ = launch("jobset.sh", "-i", "image:1", "-n", "expert", *TRICKY)
    launch("jobset.sh", "-i", "image:1", "expert", *TRICKY)
    assert launch.calls() == ["kubectl apply -f -"]
    assert yaml.safe_load(launch.manifest.read_text()) == yaml.safe_load(out)
