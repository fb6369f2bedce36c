import json
import os
import threading
import time

import pytest
from lsf_standin import parse_arguments, rank_environments

from harness.errors import UserError
from harness.parallel.launchers import Launch, detect_launch, is_requeued, job_id
from harness.parallel.rendezvous import LOST_SECONDS, RankError, Rendezvous, reserve_port

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
    assert (launch.rank, launch.n_ranks, launch.local_size) == (0, 1, 1)


def test_rank_of_slurm_with_uneven_tasks():
    launch = detect_launch(SLURM)
    assert (launch.rank, launch.n_ranks, launch.local_rank, launch.local_size) == (3, 5, 1, 2)
    assert launch.node == "n2" and launch.job == "slurm-77-0-0"
    last = {**SLURM, "SLURM_PROCID": "4", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}
    assert detect_launch(last).local_size == 1


def test_requeued_job_has_another_job_name():
    assert detect_launch({**SLURM, "SLURM_RESTART_COUNT": "1"}).job != detect_launch(SLURM).job


def test_batch_script_itself_is_one_rank():
    # sbatch --ntasks=5 without srun: SLURM_NTASKS says 5 where one process was started
    assert detect_launch({"SLURM_NTASKS": "5", "SLURM_PROCID": "0"}).n_ranks == 1


@pytest.mark.parametrize(
    ("visible", "on_node", "shared"), [(None, "4", True), ("0,1,2,3", "4", True), ("2", "4", False)]
)
def test_slurm_gpus_are_divided_where_each_rank_sees_all(visible, on_node, shared):
    environ = {**SLURM, "SLURM_GPUS_ON_NODE": on_node}
    if visible:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    assert detect_launch(environ).shares_gpus is shared


def test_ranks_of_jsrun_are_those_of_the_stand_in(tmp_path):
    arguments = parse_arguments(["-n", "5", "-r", "3", "-g", "2", "--", "true"])
    launches = [
        detect_launch(environ) for environ in rank_environments(arguments, {}, tmp_path / "file")
    ]
    assert [launch.rank for launch in launches] == [0, 1, 2, 3, 4]
    assert {launch.n_ranks for launch in launches} == {5}
    assert [launch.local_size for launch in launches] == [3, 3, 3, 2, 2]
    assert len({launch.job for launch in launches}) == 1
    assert not any(launch.shares_gpus for launch in launches)


# As seen by rank 3 of `mpirun -np 4 --host n1:2,n2:2` under Open MPI 4
MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_ess_base_jobid": "12:34",
}


@pytest.mark.parametrize(
    ("scheduler", "job"), [({}, "mpi-12-34"), ({"LSB_JOBID": "9"}, "9-12-34"), (SLURM, "mpi-12-34")]
)
def test_rank_of_mpirun_also_below_a_scheduler(scheduler, job):
    launch = detect_launch({**scheduler, **MPI})
    assert (launch.rank, launch.n_ranks, launch.local_rank, launch.local_size) == (3, 4, 1, 2)
    assert launch.job == job and launch.shares_gpus


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


def test_open_mpi_without_a_job_is_rejected():
    with pytest.raises(UserError, match="PMIX_NAMESPACE"):
        detect_launch({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"})


def tf_config(index, **cluster):
    return {"TF_CONFIG": json.dumps({"cluster": cluster, "task": {"index": index}})}


def test_given_tf_config_is_used():
    launch = detect_launch(tf_config(2, worker=["a:1", "b:1", "b:2"]))
    assert (launch.rank, launch.n_ranks, launch.local_rank, launch.local_size) == (2, 3, 1, 2)
    assert launch.addresses == ("a:1", "b:1", "b:2") and launch.node == "b"
    assert launch.shares_gpus
    own_gpus = {**tf_config(2, worker=["a:1", "b:1", "b:2"]), "CUDA_VISIBLE_DEVICES": "1"}
    assert not detect_launch(own_gpus).shares_gpus
    assert detect_launch(tf_config(0, worker=["a:1"])).n_ranks == 1


@pytest.mark.parametrize(
    "environ",
    [
        {"TF_CONFIG": "{"},
        tf_config(0, worker=["a:1"], ps=["b:1"]),
        tf_config(5, worker=["a:1", "b:1"]),
    ],
)
def test_unusable_tf_config_is_rejected(environ):
    with pytest.raises(UserError, match="TF_CONFIG cannot be used"):
        detect_launch(environ)


def ranks(n, folder):
    return [Rendezvous(Launch(rank, n, job="x"), folder) for rank in range(n)]


def test_ranks_exchange_their_announcements(tmp_path):
    found = {}

    def take_part(rendezvous):
        rendezvous.announce(number=rendezvous.launch.rank)
        found[rendezvous.launch.rank] = rendezvous.wait_for_all(seconds=20)

    threads = [threading.Thread(target=take_part, args=(m,)) for m in ranks(4, tmp_path)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {rank: [{"number": n} for n in range(4)] for rank in range(4)}


def test_missing_ranks_are_named(tmp_path):
    everyone = ranks(5, tmp_path)
    for rank in (0, 3):
        everyone[rank].announce()
    with pytest.raises(UserError, match=r"3 of 5 ranks did not start within 0 s: 1, 2, 4\."):
        everyone[0].wait_for_all(seconds=0)


def test_failure_of_a_rank_ends_the_waiting(tmp_path):
    everyone = ranks(3, tmp_path)
    everyone[1].announce(error="no such directory")
    with pytest.raises(UserError, match="Rank 1 failed: no such directory"):
        everyone[0].wait_for_all(seconds=20)


def test_reason_of_a_failing_rank_reaches_the_others(tmp_path):
    first, second = ranks(2, tmp_path)
    with pytest.raises(ValueError, match="no scenes"), second.translated_errors():
        raise ValueError("no scenes")
    with pytest.raises(RankError, match="Rank 1 failed: ValueError: no scenes"):
        first.check()


def test_rank_without_a_sign_of_life_is_lost_once_all_have_started(tmp_path):
    everyone = ranks(3, tmp_path)
    for rank in everyone:
        rank.announce()
    old = time.time() - LOST_SECONDS - 1
    everyone[0].check()
    everyone[0].wait_for_all(seconds=0)
    everyone[0].check()
    os.utime(everyone[0].folder / "rank-2.json", (old, old))
    everyone[1].check()  # it still waits for the others
    with pytest.raises(RankError, match="Lost contact with rank 2"):
        everyone[0].check()


def test_rank_renews_its_announcement(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.parallel.rendezvous.HEARTBEAT_SECONDS", 0.01)
    first, second = ranks(2, tmp_path)
    second.announce()
    os.utime(second.folder / "rank-1.json", (1, 1))
    with second:
        while 1 not in first.read():
            time.sleep(0.01)


def test_announcements_of_an_earlier_start_are_ignored(tmp_path):
    first, second = ranks(2, tmp_path)
    second.announce(error="of yesterday")
    for file in first.folder.iterdir():
        os.utime(file, (1, 1))
    assert first.read() == {}


def test_chief_removes_the_folder_of_the_ranks(tmp_path):
    everyone = ranks(2, tmp_path)
    with everyone[1]:
        everyone[1].announce()
    assert everyone[1].folder.exists()
    with everyone[0]:
        pass
    assert not everyone[0].folder.exists()


def test_reserved_ports_differ():
    sockets = [reserve_port() for _ in range(20)]
    assert len({s.getsockname()[1] for s in sockets}) == 20
    for s in sockets:
        s.close()
