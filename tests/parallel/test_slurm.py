"""Tests of the scripts in target/ on a real Slurm, whose two nodes are this host.

What the site gives is stubbed on PATH: `module`, and `conda`, whose environment is the one that
runs the tests. All else is as on Rivanna: sbatch, the script's options, its GPU request, srun.
"""

import csv
import json
import os
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import RUNNING_STATES, missing_programs, running_cluster

from harness import REPOSITORY
from tools.make_scenes import make_dataset

JOB_SECONDS = 400  # for a job, two TensorFlow processes on a busy host; 60 alone
N_TRAIN, N_INFERENCE = 4, 2
HEIGHT, WIDTH = 96, 128
N_LONG = 12  # epochs of 0.3 to 0.7 s: enough to be interrupted among
LONG = ["--set", f"epochs={N_LONG}"]

missing = missing_programs()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.timeout(2 * JOB_SECONDS + 200),
    pytest.mark.skipif(
        bool(missing), reason=f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    ),
]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running cluster with the nodes n1 and n2."""
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def settings(tmp_path_factory):
    """Options that make the reference workload a tiny one."""
    data = tmp_path_factory.mktemp("data")
    make_dataset(data, train=N_TRAIN, inference=N_INFERENCE, height=HEIGHT, width=WIDTH, seed=7)
    values = {
        "train_dir": data / "one-day",
        "inference_dir": data / "ssts",
        "IMAGE_H": HEIGHT,
        "IMAGE_W": WIDTH,
        "PATCH_SIZE": 32,
        "CROP_SIZE": 8,
        "clip_offset": 2,
        "batch_size": 8,
        "train_split": 0.5,
        "epochs": 1,
    }
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """PATH with stubs of what the site gives, then the Python that runs the tests."""
    folder = tmp_path_factory.mktemp("site")
    for name, script in {"module": "exit 0", "conda": "echo 'conda() { true; }'"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def submit(cluster, site, options, script, arguments, folder):
    """Submit a job script, wait for it, and return its facts and the folder of its run."""
    job = start_job(cluster, site, options, script, arguments, folder)
    try:
        return cluster.wait(job, JOB_SECONDS), folder / "run"
    finally:
        if (folder / "job.out").exists():  # pytest shows it where the test fails
            sys.stderr.write((folder / "job.out").read_text(errors="replace"))


def check_run(facts, run, n_nodes):
    """Check that a job ended well and that its run's folder holds what it should."""
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0")
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "success"
    assert results["devices"]["ranks"] == n_nodes
    assert results["devices"]["nodes"] == n_nodes
    assert results["training"]["scenes_train"] + results["training"]["scenes_test"] == N_TRAIN
    assert results["inference"]["scenes"] == N_INFERENCE
    with (run / "scenes.csv").open(newline="") as file:
        scenes = [row["scene"] for row in csv.DictReader(file)]
    assert scenes == sorted(mask.stem for mask in (run / "masks").iterdir())
    assert len(scenes) == N_INFERENCE

    lines = (run / "mlperf_cloudmask.log").read_text().splitlines()
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    values = {event["key"]: event["value"] for event in events}
    assert values["number_of_ranks"] == n_nodes
    assert values["number_of_nodes"] == n_nodes
    (stop,) = [event for event in events if event["key"] == "run_stop"]
    assert stop["metadata"]["status"] == "success"
    assert len([event for event in events if event["key"] == "result"]) == 1


def test_srun_starts_a_rank_on_each_node(cluster):
    words = cluster.run(
        *("srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c"),
        'echo "$SLURM_PROCID $SLURM_NTASKS $SLURMD_NODENAME $SLURM_STEP_NODELIST"',
    ).splitlines()
    assert sorted(words) == ["0 2 n1 n[1-2]", "1 2 n2 n[1-2]"]


def test_rivanna_script_runs_on_one_node(cluster, site, settings, tmp_path):
    facts, run = submit(cluster, site, [], "rivanna.sh", settings, tmp_path)
    assert facts["NumNodes"] == "1"
    assert facts["TresPerNode"] == "gres:gpu:a100:1"
    check_run(facts, run, n_nodes=1)


def test_rivanna_script_runs_on_two_nodes_by_options_alone(cluster, site, settings, tmp_path):
    options = ["--nodes=2", "--ntasks-per-node=1"]
    facts, run = submit(cluster, site, options, "rivanna.sh", settings, tmp_path)
    assert facts["NodeList"] == "n[1-2]"
    check_run(facts, run, n_nodes=2)


def test_failing_program_fails_the_job_with_its_exit_status(cluster, site, settings, tmp_path):
    arguments = [*settings, "--set", "epochs=none"]  # the user's mistake, exit status 2
    facts, run = submit(cluster, site, [], "rivanna.sh", arguments, tmp_path)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0")
    assert not run.exists()
    assert "epochs" in (tmp_path / "job.out").read_text()


@pytest.mark.parametrize("options", [[], ["--nodes=2"], ["--gres=gpu:4", "--cpus-per-task=24"]])
def test_slurm_accepts_the_options_of_the_pearl_script(cluster, options):
    cluster.run("sbatch", "--test-only", *options, REPOSITORY / "target" / "pearl.sh")


def test_series_of_runs_starts_the_script_for_any_cluster(cluster, site, settings, tmp_path):
    (tmp_path / "config.yaml").touch()
    series = tmp_path / "series"
    cluster.run(
        *(sys.executable, REPOSITORY / "tools" / "repeat.py", "-o", series, "--repeats", "1"),
        *("--config", tmp_path / "config.yaml", "--launch", REPOSITORY / "target" / "slurm.sh"),
        *settings,
        timeout=JOB_SECONDS,
        PATH=site,
        SBATCH_WAIT="1",
        SBATCH_OUTPUT=str(tmp_path / "job.out"),
        CLOUDMASK_ACCOUNT="group",
        CLOUDMASK_PARTITION="gpu",
        CLOUDMASK_NODES="2",
        CLOUDMASK_GPUS="a100:4",
        CLOUDMASK_CONDA="cloudmask",
    )
    assert (series / "comparison.md").exists()
    job = json.loads((series / "run-1" / "results.json").read_text())["job"]
    facts = cluster.facts(job)
    assert (facts["Account"], facts["TresPerNode"]) == ("group", "gres:gpu:a100:4")
    assert (facts["NodeList"], facts["Requeue"]) == ("n[1-2]", "1")
    check_run(facts, series / "run-1", n_nodes=2)


@pytest.mark.parametrize(("script", "n_nodes"), [("rivanna.sh", 1), ("slurm.sh", 2)])
def test_job_that_meets_its_time_limit_is_requeued_and_goes_on(
    cluster, site, settings, tmp_path, script, n_nodes
):
    nodes = [f"--nodes={n_nodes}", "--ntasks-per-node=1", "--export=ALL,CLOUDMASK_CONDA=cloudmask"]
    job = start_job(cluster, site, nodes, script, [*settings, *LONG], tmp_path)
    history = tmp_path / "run" / "history.csv"
    wait_until(lambda: history.exists() and len(epochs_of(tmp_path / "run")) >= 2, job, cluster)
    # What slurmctld does 300 s before the limit; a limit counts in whole minutes.
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    facts = cluster.wait(job, JOB_SECONDS, restarts=1)
    sys.stderr.write((tmp_path / "job.out").read_text(errors="replace"))
    assert facts["Restarts"] == "1"
    check_run(facts, tmp_path / "run", n_nodes)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [part["status"] for part in results["parts"]] == ["aborted", "success"]
    assert results["resumed"] == 1
    assert epochs_of(tmp_path / "run") == list(range(1, N_LONG + 1))
    assert "Stopped: received SIGTERM" in (tmp_path / "job.out").read_text()


def test_slurm_sends_the_signal_before_the_limit_of_the_script(cluster, tmp_path):
    for name in ("rivanna.sh", "slurm.sh"):
        script = (REPOSITORY / "target" / name).read_text()
        assert "#SBATCH --signal=B:USR1@300" in script and "#SBATCH --requeue" in script
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash\nsource target/requeue.bash\n"
        "requeue_unless_done srun bash -c 'trap \"exit 143\" TERM; sleep 90 & wait'\n"
    )
    # Slurm may send it up to 60 s early: here at once.
    options = ["--time=1", "--signal=B:USR1@55", "--requeue", "--open-mode=append"]
    job = start_job(cluster, site=os.environ["PATH"], options=options,
                    script=tmp_path / "job.sh", arguments=[], folder=tmp_path)  # fmt: skip
    wait_until(lambda: restarts(cluster, job) == 1, job, cluster)
    cluster.run("scancel", job)


def test_run_that_fails_near_the_limit_is_not_requeued(cluster, tmp_path):
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash\nsource target/requeue.bash\n"
        "requeue_unless_done srun bash -c 'trap \"exit 2\" TERM; touch ready; sleep 90 & wait'\n"
        .replace("touch ready", f"touch {tmp_path}/ready")
    )  # fmt: skip
    job = start_job(cluster, os.environ["PATH"], ["--requeue"], tmp_path / "job.sh", [], tmp_path)
    wait_until((tmp_path / "ready").exists, job, cluster)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    facts = cluster.wait(job, JOB_SECONDS)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")


def start_job(cluster, site, options, script, arguments, folder):
    """Submit a job script and return the job's number."""
    outputs = ["--set", f"output_dir={folder}", "--set", "run_name=run"] if arguments else []
    return cluster.run(
        *("sbatch", "--parsable", f"--chdir={REPOSITORY}", f"--output={folder}/job.out"),
        *(*options, REPOSITORY / "target" / script, *arguments, *outputs),
        PATH=site,
    ).strip()


def epochs_of(run):
    """The epochs of history.csv."""
    with (run / "history.csv").open(newline="") as file:
        return [int(row["epoch"]) for row in csv.DictReader(file)]


def restarts(cluster, job):
    """How often a job was queued again."""
    return int(cluster.facts(job)["Restarts"])


def wait_until(done, job, cluster):
    """Wait for something that a job does."""
    deadline = time.monotonic() + JOB_SECONDS
    while not done():
        state = cluster.facts(job)["JobState"]
        assert state in RUNNING_STATES and time.monotonic() < deadline, (state, cluster.logs())
        time.sleep(0.2)
