import contextlib
import json
import os
import re
import shutil
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from lsf_standin import parse_arguments, rank_environments

from harness.errors import UserError
from harness.parallel.launchers import Launch, detect_launch, is_requeued, job_id
from harness.parallel.rendezvous import LOST_HEARTBEATS, RankError, Rendezvous, reserve_port

# As seen by rank 3 of `srun --nodes=3 --ntasks=5` under Slurm 22.05
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "n2",
}


def test_without_a_launcher_there_is_one_rank():
    launch = detect_launch({})
    assert (launch.rank, launch.n_ranks) == (0, 1)


LAUNCHES = {  # what rank 2 of 4 sees, by launcher
    "Slurm": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_JOB_ID": "7"},
    "Slurm with PMIx": {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "PMIX_RANK": "2", "PMIX_NAMESPACE": "n",
    },
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "2"},
    "MPICH": {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"},
    "Intel MPI below Slurm": {
        "PMI_RANK": "2", "PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1",
    },
    "Open MPI below a step of one task": {
        "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_PROCID": "0",
    },
    "MVAPICH2": {"MV2_COMM_WORLD_RANK": "2", "MV2_COMM_WORLD_SIZE": "4"},
    "Cray PALS": {"PMI_RANK": "2", "PMI_SIZE": "4", "PALS_RANKID": "2", "PALS_APID": "a"},
    "Flux": {"FLUX_TASK_RANK": "2", "FLUX_JOB_SIZE": "4", "FLUX_JOB_ID": "f"},
    "torchrun": {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
    "Slurm, exported for torch": {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "RANK": "2", "WORLD_SIZE": "4",
    },
    "torchrun below Slurm": {
        "RANK": "2", "WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1",
    },
}  # fmt: skip


@pytest.mark.parametrize("environ", LAUNCHES.values(), ids=LAUNCHES)
def test_launcher_gives_rank_and_size(environ):
    launch = detect_launch(environ)
    assert (launch.rank, launch.n_ranks) == (2, 4)
    assert set(launch.variables) <= set(environ)
    assert re.fullmatch(r"[\w-]+", launch.job)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1 .* no variable gives the number of ranks"),
        ({"ALPS_APP_PE": "0"}, "ALPS_APP_PE"),
        ({"RANK": "0"}, "RANK=0 .* no variable gives the number of ranks"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_PROCID=1 .* no variable"),
        ({"SLURM_PROCID": "0", "PMIX_RANK": "0"}, "PMIX_RANK=0"),
        ({"MV2_COMM_WORLD_RANK": "1"}, "MV2_COMM_WORLD_SIZE=''"),
        ({"FLUX_TASK_RANK": "1"}, "FLUX_JOB_SIZE=''"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_SIZE=''"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE=''"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=''"),
        ({"PMI_RANK": "2", "PMI_SIZE": "2"}, "PMI_RANK='2'"),
        ({"PMI_RANK": "-1", "PMI_SIZE": "2"}, "PMI_RANK='-1'"),
        ({"PMI_RANK": "one", "PMI_SIZE": "2"}, "PMI_RANK='one'"),
        (LAUNCHES["MPICH"] | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
         "say rank 1 of 4, but PMI_RANK and PMI_SIZE say rank 2 of 4"),
        (LAUNCHES["Slurm"] | {"RANK": "0", "WORLD_SIZE": "2"}, "Unset the variables"),
    ],
)  # fmt: skip
def test_incomplete_and_contradictory_variables_are_rejected(environ, words):
    with pytest.raises(UserError, match=words):
        detect_launch(environ)


def test_node_of_slurm_is_its_name_for_it():
    launch = detect_launch(SLURM)
    assert (launch.rank, launch.n_ranks, launch.node) == (3, 5, "n2")
    assert launch.job == "77-slurm-77-0"


def test_requeued_job_has_another_job_name():
    assert detect_launch({**SLURM, "SLURM_RESTART_COUNT": "1"}).job != detect_launch(SLURM).job


def test_batch_script_itself_is_one_rank():
    # sbatch --ntasks=5 without srun: SLURM_NTASKS says 5 where one process was started
    assert detect_launch({"SLURM_NTASKS": "5", "SLURM_PROCID": "0"}).n_ranks == 1


def test_ranks_of_jsrun_are_those_of_the_stand_in(tmp_path):
    arguments = parse_arguments(["-n", "5", "-r", "3", "-g", "2", "--", "true"])
    launches = [
        detect_launch(environ) for environ in rank_environments(arguments, {}, tmp_path / "file")
    ]
    assert [launch.rank for launch in launches] == [0, 1, 2, 3, 4]
    assert {launch.n_ranks for launch in launches} == {5}
    assert len({launch.job for launch in launches}) == 1


@pytest.mark.parametrize(
    ("environ", "job", "requeued"),
    [
        ({}, None, False),
        ({"LSB_JOBID": "9"}, "9", False),
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0"}, "77", False),
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, "77", True),
    ],
)
def test_job_of_the_scheduler(environ, job, requeued):
    assert (job_id(environ), is_requeued(environ)) == (job, requeued)


def tf_config(index, kind="worker", **cluster):
    config = {"cluster": cluster, "task": {"type": kind, "index": index}}
    return {"TF_CONFIG": json.dumps(config)}


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        (tf_config(2, worker=["a:1", "b:1", "b:2"]), 2),
        (tf_config(0, "chief", chief=["a:1"], worker=["b:1", "b:2"]), 0),  # Kubeflow
        (tf_config(1, chief=["a:1"], worker=["b:1", "b:2"]), 2),
        (tf_config(1, master=["a:1"], worker=["b:1", "b:2"]), 2),  # SageMaker
    ],
)
def test_tf_config_is_used(environ, rank):
    launch = detect_launch(environ)
    assert (launch.rank, launch.n_ranks) == (rank, 3)
    assert launch.addresses == ("a:1", "b:1", "b:2")
    assert launch.node == ("b" if rank else "a")


@pytest.mark.parametrize(
    "environ",
    [tf_config(0, worker=["a:1"]), tf_config(0, "chief", chief=["a:1"]), {"TF_CONFIG": "{}"}],
)
def test_tf_config_of_one_machine_is_an_ordinary_run(environ):
    launch = detect_launch(environ)
    assert (launch.rank, launch.n_ranks, launch.addresses) == (0, 1, ())


@pytest.mark.parametrize(
    "environ",
    [
        {"TF_CONFIG": "{"},
        {"TF_CONFIG": "[]"},
        {"TF_CONFIG": '{"cluster": {"worker": ["a:1", "b:1"]}}'},
        tf_config(0, worker=["a:1"], ps=["b:1"]),
        tf_config(0, "ps", worker=["a:1"], ps=["b:1"]),
        tf_config(0, "evaluator", worker=["a:1"], evaluator=["b:1"]),
        tf_config(5, worker=["a:1", "b:1"]),
    ],
)
def test_unusable_tf_config_is_rejected(environ):
    with pytest.raises(UserError, match="TF_CONFIG cannot be used"):
        detect_launch(environ)


def ranks(n, folder, variables=("PMI_RANK", "PMI_SIZE")):
    return [Rendezvous(Launch(r, n, job="x", variables=variables), folder) for r in range(n)]


def together(everyone, action):
    """What an action returns or raises for each rank; all ranks act at once."""
    with ThreadPoolExecutor(len(everyone)) as pool:
        futures = [pool.submit(action, rank) for rank in everyone]
    return [future.exception() or future.result() for future in futures]


def meet(rendezvous):
    rendezvous.announce(number=rendezvous.launch.rank)
    return rendezvous.wait_for_all(seconds=20)


def test_ranks_exchange_their_announcements(tmp_path):
    assert together(ranks(4, tmp_path), meet) == [[{"number": n} for n in range(4)]] * 4
    assert stat.S_IMODE((tmp_path / ".ranks-x").stat().st_mode) == 0o700


def test_missing_ranks_are_named(tmp_path):
    everyone = ranks(5, tmp_path)
    for rank in (0, 3):
        everyone[rank].announce()
    everyone[0].read()
    everyone[3].read()
    with pytest.raises(UserError, match=r"3 of 5 ranks did not start within 0 s: 1, 2, 4\."):
        everyone[0].wait_for_all(seconds=0)


def test_awaited_ranks_are_reported_with_how_to_run_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("harness.parallel.rendezvous.REPORT_SECONDS", 0)
    first = ranks(3, tmp_path)[0]
    first.announce()
    with caplog.at_level("WARNING"), pytest.raises(UserError, match="did not start"):
        first.wait_for_all(seconds=0.3)
    (message,) = caplog.messages
    assert "Waiting for 2 of 3 ranks: 1, 2." in message
    assert "env -u PMI_RANK -u PMI_SIZE python slstr_cloud.py" in message


def test_failure_of_a_rank_ends_the_waiting(tmp_path):
    everyone = ranks(3, tmp_path)
    everyone[1].announce(error="no such directory")
    everyone[0].announce()
    with pytest.raises(UserError, match="Rank 1 failed: no such directory"):
        everyone[0].wait_for_all(seconds=20)


def test_reason_of_the_chief_reaches_a_late_rank(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.parallel.rendezvous.FAILURE_SECONDS", 2)
    first, second = ranks(2, tmp_path)

    def fail():
        with pytest.raises(ValueError), first, first.translated_errors():
            raise ValueError("no scenes")

    with ThreadPoolExecutor() as pool:
        failed = pool.submit(fail)
        time.sleep(5)  # longer than the chief waits for those who have come
        second.announce()
        with pytest.raises(UserError, match="Rank 0 failed: ValueError: no scenes"):
            second.wait_for_all(seconds=20)
        failed.result()


def test_reason_of_a_failing_rank_reaches_the_others(tmp_path):
    first, second = ranks(2, tmp_path)
    together([first, second], meet)
    with pytest.raises(ValueError, match="no scenes"), second.translated_errors():
        raise ValueError("no scenes")
    with pytest.raises(RankError, match="Rank 1 failed: ValueError: no scenes"):
        first.check()


@pytest.mark.parametrize("lives", [True, False])
def test_second_start_does_not_disturb_a_living_one(tmp_path, monkeypatch, lives):
    monkeypatch.setattr("harness.parallel.rendezvous.HEARTBEAT_SECONDS", 0.5)
    first, second = ranks(2, tmp_path)
    together([first, second], meet)
    other = ranks(2, tmp_path)[0]
    with contextlib.ExitStack() as alive:
        for rank in (first, second) if lives else ():
            alive.enter_context(rank)
        expected = pytest.raises(UserError, match="Two processes are rank 0")
        with expected if lives else contextlib.nullcontext(), other:
            other.announce()
        assert first.folder.exists() == lives  # a chief removes its own
        if lives:
            first.check()
            second.check()


def test_rank_that_another_process_replaced_fails(tmp_path):
    first, second = ranks(2, tmp_path)
    together([first, second], meet)
    (first.folder / "rank-0.json").write_text(
        (first.folder / "rank-1.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    with pytest.raises(UserError, match="Two processes are rank 0"):
        first.check()


def test_failure_of_another_rank_is_not_announced_again(tmp_path):
    first, second, third = ranks(3, tmp_path)
    second.announce(error="no such network")
    first.announce()
    with pytest.raises(UserError) as error, first.translated_errors():
        first.wait_for_all(seconds=5)
    third.announce()
    with pytest.raises(UserError) as same:
        third.wait_for_all(seconds=5)
    assert str(error.value) == str(same.value) == "Rank 1 failed: no such network"


def test_files_of_an_earlier_start_are_ignored(tmp_path):
    """Of a start that was killed a moment ago, with the same job."""
    together(ranks(3, tmp_path), meet)
    first, second, third = ranks(3, tmp_path)
    first.announce()
    second.announce()
    first.read()
    second.read()
    with pytest.raises(UserError, match="1 of 3 ranks did not start within 0 s: 2"):
        first.wait_for_all(seconds=0)
    assert together([first, second, third], meet) == [[{"number": n} for n in range(3)]] * 3


def test_old_failures_are_ignored(tmp_path):
    first, second = ranks(2, tmp_path)
    second.announce(error="of yesterday")
    os.utime(second.folder / "rank-1.json", (1, 1))
    assert first.read() == {}


def test_failures_of_an_earlier_start_are_ignored(tmp_path, monkeypatch):
    """The chief was killed, and the ranks start again before the files are old."""
    monkeypatch.setattr("harness.parallel.rendezvous.HEARTBEAT_SECONDS", 1)
    together(everyone := ranks(2, tmp_path), meet)
    everyone[1].announce(error="Lost contact with rank 0")
    assert together(ranks(2, tmp_path)[:1], announce_and_read) == [{0: {}}]


def announce_and_read(rendezvous):
    rendezvous.announce()
    return rendezvous.read()


def test_rank_without_a_sign_of_life_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.parallel.rendezvous.HEARTBEAT_SECONDS", 0.01)
    everyone = ranks(3, tmp_path)
    together(everyone, meet)
    for rank in everyone:
        rank.check()  # none has beaten yet: nobody is lost, however long that takes
    with everyone[0], everyone[1]:
        while not (failure := everyone[1].failure()):
            everyone[0].read()
    assert failure.startswith("Lost contact with rank 2")


@pytest.mark.parametrize("is_closed", [True, False])
def test_silent_rank_is_lost_at_once_if_its_port_is_closed(tmp_path, monkeypatch, is_closed):
    monkeypatch.setattr("harness.parallel.rendezvous.HEARTBEAT_SECONDS", 0.01)
    everyone, failures, sockets = ranks(2, tmp_path), [], [reserve_port() for _ in range(2)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    together(everyone, partial(connect, addresses=addresses))
    if is_closed:
        sockets[1].close()
        monkeypatch.setattr("harness.parallel.rendezvous.LOST_HEARTBEATS", 10**9)
    first, ended = everyone[0], threading.Event()
    with first:
        first.watch(lambda failure: failures.append(failure) or ended.set())
        ended.wait()
        n_beats = json.loads((first.folder / "rank-0.json").read_text())["beat"]
    (failure,) = failures
    assert failure.startswith("Lost contact with rank 1") and "--resume" in failure
    assert is_closed or n_beats >= LOST_HEARTBEATS
    for s in sockets:
        s.close()


def test_nobody_is_lost_because_the_disk_is_full(tmp_path):
    first = ranks(2, tmp_path)[0]
    together([first, ranks(2, tmp_path)[1]], meet)
    shutil.rmtree(first.folder)  # as a full disk: nothing can be written there
    for _ in range(2 * LOST_HEARTBEATS):
        with pytest.raises(OSError):
            first.beat()
    first.check()


def test_clocks_of_nodes_may_differ(tmp_path):
    first, second = ranks(2, tmp_path)
    together([first, second], meet)
    for file in first.folder.iterdir():
        os.utime(file, (1, 1))
    first.check()
    second.check()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"key": 1, "seen": [], "beat": 0, "facts": {}}', "x" * 2**21]
)
def test_damaged_announcement_is_one_clear_error(tmp_path, content):
    first = ranks(2, tmp_path)[0]
    first.announce()
    (first.folder / "rank-1.json").write_text(content)
    with pytest.raises(UserError, match=r"rank-1\.json is no announcement of a rank"):
        first.read()


@pytest.mark.parametrize("trap", ["link", "pipe"])
def test_announcement_that_is_no_file_is_rejected(tmp_path, trap):
    first = ranks(2, tmp_path)[0]
    first.announce()
    path = first.folder / "rank-1.json"
    os.mkfifo(path) if trap == "pipe" else path.symlink_to(first.folder / "rank-0.json")
    with pytest.raises((UserError, OSError), match="rank-1"):
        first.read()


def test_user_may_have_another_number_on_the_file_system(tmp_path, monkeypatch):
    for name in ("getuid", "geteuid"):
        monkeypatch.setattr(os, name, lambda: 12345)
    ranks(2, tmp_path)[0].announce()


@pytest.mark.parametrize("kind", ["link", "of another user"])
def test_folder_of_another_kind_is_rejected(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    if kind == "link":
        (tmp_path / ".ranks-x").symlink_to(tmp_path / "elsewhere")
    elif os.geteuid() == 0:
        (tmp_path / ".ranks-x").mkdir()
        os.chown(tmp_path / ".ranks-x", 12345, -1)
    else:
        pytest.skip("only root can give a folder to another user")
    with pytest.raises(UserError, match="belongs to another user, or is no folder"):
        ranks(2, tmp_path)[0].announce()


def connect(rendezvous, addresses):
    meet(rendezvous)
    rendezvous.check_connections(addresses)


def test_ranks_reach_each_other(tmp_path):
    sockets = [reserve_port() for _ in range(3)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    assert together(ranks(3, tmp_path), partial(connect, addresses=addresses)) == [None] * 3
    for s in sockets:
        s.close()


@pytest.mark.parametrize("host", ["localhost", "host.invalid"])
def test_rank_that_cannot_be_reached_is_named(tmp_path, host):
    with reserve_port() as closed:
        addresses = [f"{host}:{closed.getsockname()[1]}"] * 2
    first = ranks(2, tmp_path)[0]
    first.announce()
    with pytest.raises(UserError, match=rf"cannot reach rank 0 at {host}:\d+: .*firewalls"):
        first.check_connections(addresses)


def test_chief_removes_the_folder_of_the_ranks(tmp_path):
    everyone = ranks(2, tmp_path)
    with everyone[1]:
        everyone[1].announce()
    assert everyone[1].folder.exists()
    with everyone[0]:
        everyone[0].announce()
    assert not everyone[0].folder.exists()


def test_reserved_ports_differ():
    sockets = [reserve_port() for _ in range(20)]
    assert len({s.getsockname()[1] for s in sockets}) == 20
    for s in sockets:
        s.close()
