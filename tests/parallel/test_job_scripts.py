"""Tests of the job scripts in target/ without their schedulers: what they load and what they start.

test_slurm.py runs the Slurm scripts on a real Slurm. LSF has none that is free: lsf_standin.py
stands in for jsrun here.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import REPOSITORY

TARGET = REPOSITORY / "target"
STANDIN = Path(__file__).with_name("lsf_standin.py")
SCRIPTS = sorted([*TARGET.glob("*.sh"), *TARGET.glob("*.job")])
TWO_NODES = "batch2 1 127.0.0.1 42 127.0.0.2 42"  # as LSF: the launch node, then the compute nodes
PROGRAM = ["python", "slstr_cloud.py"]
LAUNCHES = ["docs/clusters.md", "tools/repeat.py", "tools/scaling.py"]
JOB = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", "CLOUDMASK_CONDA": "cloudmask"}


def stub(path, script):
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def site(tmp_path):
    """A folder with stubs of the site's programs, which write down their arguments, a line each."""
    for name in ("module", "sbatch", "srun", "jsrun"):
        stub(tmp_path / name, f"printf '%s\\n' \"$@\" > '{tmp_path}/{name}.arguments'")
    stub(tmp_path / "conda", "echo 'conda() { true; }'")
    return tmp_path


def run_script(name, *arguments, site, **environment):
    """Run a job script as its scheduler would, with the stubs first on PATH."""
    path = os.pathsep.join([str(site), os.environ["PATH"]])
    return subprocess.run(
        ["bash", TARGET / name, *arguments],
        env={**os.environ, "PATH": path, "USER": "ada", **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def arguments_of(name, site):
    """What a stub was started with."""
    return (site / f"{name}.arguments").read_text().splitlines()


def start_standin(*arguments, code, **environment):
    """Start the stand-in with Python code as the program."""
    return subprocess.Popen(
        [sys.executable, STANDIN, *arguments, "--", sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
class TestEveryScript:
    def test_is_executable_and_valid_bash(self, script):
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)

    def test_names_no_file_of_the_repository_that_does_not_exist(self, script):
        words = script.read_text().replace("(", " ").replace(";", " ").split()
        named = {word for word in words if word.startswith(("target/", "slstr", "environment."))}
        assert {"slstr_cloud.py", f"target/{script.name}"} <= named
        assert [name for name in named if not (REPOSITORY / name).is_file()] == []

    def test_stops_where_the_environment_is_missing(self, script, site):
        stub(site / "conda", "echo 'conda() { echo no environment >&2; return 1; }'")
        arguments = ["model.keras", "scenes", "10"]
        ended = run_script(script.name, *arguments, site=site, **JOB, LSB_MCPU_HOSTS=TWO_NODES)
        assert ended.returncode == 1
        assert "no environment" in ended.stderr
        assert not list(site.glob("*run.arguments"))  # srun, jsrun


def test_archive_task_masks_its_shard_and_resumes_it_later(site, tmp_path):
    stub(site / "python", f"printf '%s\\n' \"$@\" > '{site}/python.arguments'")
    arguments = ["m.keras", "list.txt", "10", str(tmp_path / "out")]
    task = {"SLURM_ARRAY_TASK_ID": "3", "CLOUDMASK_VENV": "", "CLOUDMASK_CONDA": ""}
    assert run_script("archive.sh", *arguments, site=site, **task).returncode == 0
    given = ["model_file=m.keras", "inference_dir=list.txt", "shard=3/10"]  # a run rejects others
    assert arguments_of("python", site) == [
        "slstr_cloud.py", "--mode", "inference", "--set", *given, f"output_dir={tmp_path}/out",
        "run_name=shard-3", "on_bad_scene=skip",
    ]  # fmt: skip
    (tmp_path / "out/shard-3").mkdir(parents=True)
    assert run_script("archive.sh", *arguments, site=site, **task).returncode == 0
    resumed = ["slstr_cloud.py", "--resume", f"{tmp_path}/out/shard-3", "--set", *given]
    assert arguments_of("python", site) == resumed


@pytest.mark.parametrize(
    ("script", "arguments", "status"), [("archive.sh", [], 2), ("slurm.sh", ["--help"], 0)]
)
def test_usage_is_the_comment_of_the_script(site, script, arguments, status):
    ended = run_script(script, *arguments, site=site, SLURM_JOB_ID="")
    assert ended.returncode == status
    text = ended.stdout + ended.stderr
    assert f" target/{script} " in text
    assert not {"set -e", "#!/bin/bash"} & set(text.splitlines())
    assert not list(site.glob("*.arguments"))


@pytest.mark.parametrize(
    ("array", "job"),
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3")],
)
def test_time_limit_of_one_task_leaves_the_rest_of_its_array_alone(site, array, job):
    stub(site / "scancel", f"echo $2 > '{site}/scancel.arguments'; touch '{site}/stopped'")
    stub(site / "scontrol", f"echo $2 > '{site}/scontrol.arguments'")
    # The step signals its job script, then waits until the script has signalled the step.
    step = f"kill -USR1 $PPID; until [ -e '{site}/stopped' ]; do sleep 0.01; done; exit 143"
    path = os.pathsep.join([str(site), os.environ["PATH"]])
    script = f"source target/requeue.bash; requeue_unless_done sh -c {shlex.quote(step)}"
    ended = subprocess.run(
        ["bash", "-c", script], cwd=REPOSITORY, timeout=60, check=False,
        env={**os.environ, "PATH": path, "SLURM_JOB_ID": "7", **array},
    )  # fmt: skip
    assert ended.returncode == 143
    assert arguments_of("scancel", site) == arguments_of("scontrol", site) == [job]


@pytest.mark.parametrize("script", ["rivanna.sh", "pearl.sh", "slurm.sh"])
class TestSlurmScripts:
    def test_start_the_program_with_srun_and_pass_arguments_on(self, script, site):
        ended = run_script(script, "--set", "run_name=a b", site=site, **JOB)
        assert (ended.returncode, ended.stderr) == (0, "")
        *options, a, b, key, value = arguments_of("srun", site)
        # Without --config: --resume would then not continue with the run's own configuration.
        assert [a, b, key, value] == [*PROGRAM, "--set", "run_name=a b"]
        assert "--cpus-per-task=8" in options  # srun does not inherit it since Slurm 22.05

    def test_take_another_configuration(self, script, site):
        run_script(script, site=site, **JOB, CLOUDMASK_CONFIG="my own.yaml")
        assert arguments_of("srun", site)[-2:] == ["--config", "my own.yaml"]

    def test_exit_with_the_programs_status(self, script, site):
        stub(site / "srun", "exit 143")
        assert run_script(script, site=site, **JOB).returncode == 143


class TestAnySlurm:
    """target/slurm.sh, which submits itself."""

    @pytest.mark.parametrize(
        ("variables", "options"),
        [
            (
                {},
                ["--nodes=1", "--gres=gpu:1", "--cpus-per-task=8", "--mem=64G", "--time=12:00:00"],
            ),
            (
                {"ACCOUNT": "a b", "PARTITION": "p", "NODES": "2", "GPUS": "a100:4", "CPUS": "4",
                 "MEMORY": "9G", "TIME": "1:00:00"},
                ["--account=a b", "--partition=p", "--nodes=2", "--gres=gpu:a100:4",
                 "--cpus-per-task=4", "--mem=9G", "--time=1:00:00"],
            ),
            (dict.fromkeys(["NODES", "GPUS", "CPUS", "MEMORY", "TIME"], ""), []),
        ],
    )  # fmt: skip
    def test_submits_itself_with_what_the_variables_say(self, site, variables, options):
        environment = {f"CLOUDMASK_{name}": value for name, value in variables.items()}
        ended = run_script("slurm.sh", "--set", "run_name=a b", site=site, **environment)
        assert (ended.returncode, ended.stderr) == (0, "")
        script = [str(TARGET / "slurm.sh"), "--set", "run_name=a b"]
        assert arguments_of("sbatch", site) == [*options, *script]
        assert not (site / "srun.arguments").exists()

    @pytest.mark.parametrize("place", LAUNCHES)
    def test_documented_launcher_waits_for_a_job_with_gpus(self, site, place):
        launches = re.findall(r"--launch '(.+?)'", (REPOSITORY / place).read_text())
        assert launches
        stub(site / "sbatch", f"echo wait=$SBATCH_WAIT $* > '{site}/sbatch.arguments'")
        environment = {**os.environ, "PATH": f"{site}{os.pathsep}{os.environ['PATH']}"}
        for launch in launches:
            command = [*shlex.split(launch.format(ranks=3)), "--set", "epochs=1"]
            subprocess.run(command, env=environment, cwd=REPOSITORY, check=True)
            (words,) = arguments_of("sbatch", site)
            assert "wait=1 " in words and " --gres=gpu:1 " in words
            assert (" --nodes=3 " in words) == ("{ranks}" in launch)
            assert words.endswith(" target/slurm.sh --set epochs=1")

    @pytest.mark.parametrize(
        ("variables", "python"),
        [
            ({"CONTAINER": "my.sif"}, ["apptainer", "exec", "--nv", "my.sif", "python"]),
            ({"CONTAINER": "c", "GPUS": ""}, ["apptainer", "exec", "c", "python"]),
            ({"CONDA": "mine"}, ["python"]),
            ({"VENV": "{site}"}, ["python"]),
        ],
    )
    def test_job_uses_container_conda_or_venv(self, site, variables, python):
        stub(site / "conda", f"echo 'conda() {{ echo conda $2 > {site}/used; }}'")
        (site / "bin").mkdir()
        (site / "bin/activate").write_text(f"echo venv > {site}/used\n")
        values = {f"CLOUDMASK_{k}": v.format(site=site) for k, v in variables.items()}
        job = {"SLURM_JOB_ID": "7", "CLOUDMASK_MODULES": "one two"}
        ended = run_script("slurm.sh", site=site, **job, **values)
        assert (ended.returncode, ended.stderr) == (0, "")
        words = arguments_of("srun", site)
        assert words == ["--wait=90", *python, "slstr_cloud.py"]
        used = (site / "used").read_text().strip() if (site / "used").exists() else None
        assert used == {"CONDA": "conda mine", "VENV": "venv"}.get(next(iter(variables)))
        assert arguments_of("module", site) == ["load", "two"]  # the last of two calls


class TestSummit:
    @pytest.mark.parametrize(("hosts", "ranks"), [(TWO_NODES, "12"), ("batch2 1 h1 42", "6")])
    def test_starts_a_rank_for_each_gpu(self, site, hosts, ranks):
        ended = run_script("summit.job", "--set", "epochs=1", site=site, LSB_MCPU_HOSTS=hosts)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert arguments_of("module", site) == ["load", "open-ce"]
        # A resource set of one rank, 42 cores / 6 = 7 cores and one GPU; six of them a node
        assert arguments_of("jsrun", site) == [
            *["-n", ranks, "-r", "6", "-a", "1", "-c", "7", "-g", "1"],
            *["-b", "packed:7", "-d", "packed", "-X", "1"],
            *[*PROGRAM, "--set", "cache_dir=/mnt/bb/ada", "--set", "epochs=1"],
        ]

    def test_starts_twelve_ranks_on_two_nodes_through_the_stand_in(self, site):
        stub(site / "jsrun", f'exec "{sys.executable}" "{STANDIN}" "$@"')
        stub(site / "python", f"env > '{site}'/rank-$OMPI_COMM_WORLD_RANK")
        ended = run_script("summit.job", site=site, LSB_MCPU_HOSTS=TWO_NODES)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert len(list(site.glob("rank-*"))) == 12
        last = (site / "rank-11").read_text().splitlines()
        assert "OMPI_COMM_WORLD_LOCAL_RANK=5" in last
        assert "CUDA_VISIBLE_DEVICES=5" in last


class TestStandIn:
    def test_gives_ranks_the_environment_of_jsrun(self, tmp_path):
        code = (
            "import json, os, pathlib\n"
            "values = dict(os.environ)\n"
            "values['hosts'] = open(values['LSB_DJOB_RANKFILE']).read().split()\n"
            f"pathlib.Path({str(tmp_path)!r}, values['PMIX_RANK']).write_text(json.dumps(values))"
        )
        process = start_standin("-n", "3", "-r", "2", code=code, LSB_JOBID="77")
        assert process.communicate(timeout=60)[1] == ""
        ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
        assert [rank["OMPI_COMM_WORLD_RANK"] for rank in ranks] == ["0", "1", "2"]
        # Two ranks on the first host, the third alone on the second
        assert [rank["OMPI_COMM_WORLD_LOCAL_RANK"] for rank in ranks] == ["0", "1", "0"]
        assert [rank["OMPI_COMM_WORLD_LOCAL_SIZE"] for rank in ranks] == ["2", "2", "1"]
        for name in ("RANK", "SIZE", "LOCAL_RANK"):
            assert [r[f"JSM_NAMESPACE_{name}"] for r in ranks] == [
                r[f"OMPI_COMM_WORLD_{name}"] for r in ranks
            ]
        for rank in ranks:
            assert (rank["OMPI_COMM_WORLD_SIZE"], rank["LSB_JOBID"]) == ("3", "77")
            assert rank["LSB_MCPU_HOSTS"] == "batch1 1 127.0.0.1 42 127.0.0.2 42"
            assert rank["hosts"] == ["batch1", *["127.0.0.1"] * 42, *["127.0.0.2"] * 42]

    def test_one_failure_ends_all_and_gives_the_exit_status(self):
        code = (
            "import os, sys, time\n"
            "sys.exit(3) if os.environ['OMPI_COMM_WORLD_RANK'] == '1' else time.sleep(60)"
        )
        begin = time.monotonic()
        process = start_standin("-n", "3", code=code)
        assert "rank 1 ended with 3" in process.communicate(timeout=60)[1]
        assert process.returncode == 3
        assert time.monotonic() - begin < 40

    def test_sigterm_reaches_the_ranks(self, tmp_path):
        code = (
            "import os, pathlib, signal, sys, time\n"
            f"file = pathlib.Path({str(tmp_path)!r}, os.environ['PMIX_RANK'])\n"
            "def stop(*_): file.write_text('stopped'); sys.exit(0)\n"
            "signal.signal(signal.SIGTERM, stop)\n"
            "file.write_text('started')\n"
            "time.sleep(60)"
        )
        process = start_standin("-n", "2", code=code)
        files = [tmp_path / "0", tmp_path / "1"]
        deadline = time.monotonic() + 30
        while [f.read_text() for f in files if f.exists()] != ["started"] * 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143
        assert [f.read_text() for f in files] == ["stopped"] * 2
