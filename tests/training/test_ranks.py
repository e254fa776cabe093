"""The place of a process among its ranks, from what launchers set, and what all ranks learn of one."""

import os
import socket
from datetime import timedelta
from threading import Lock

import pytest
import torch
import torch.distributed as dist

from agrepa_fast import launch
from agrepa_fast.errors import UserError
from agrepa_fast.launch import (
    check_master_address,
    complete_launch_environment,
    launched_rank,
    local_device,
    number_gpu,
)
from agrepa_fast.ranks import Ranks, all_gather, first_failure, from_rank_0, launched, on_rank_0
from agrepa_fast.zero import process_group
from agrepa_fast.zero.process_group import join_process_group

from ..ranks import fork_ranks

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
INTEL_MPI = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}


@pytest.fixture
def environment(monkeypatch):
    """environment(values): these alone of all variables that tell a rank its place."""

    def replace(values):
        for name in (*PLACE, *(name for names in launch._LAUNCHERS.values() for name in names), "CUDA_VISIBLE_DEVICES"):
            monkeypatch.setenv(name, "")  # so that the end of the test restores what is set from here on
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return replace


class TestLaunchEnvironment:
    @pytest.mark.parametrize("launcher", [SRUN, OPEN_MPI, INTEL_MPI])
    @pytest.mark.parametrize("given", [{}, {"RANK": "5"}, {"RANK": "5", "WORLD_SIZE": "8"}])
    def test_srun_and_mpirun_tell_what_is_missing(self, launcher, given, environment):
        environment(launcher | given | ADDRESS)
        assert complete_launch_environment() == 8
        assert [os.environ[name] for name in PLACE] == ["5", "8", "1", "node1", "29500"]

    def test_what_is_set_stays(self, environment):
        given = dict(zip(PLACE, ("2", "4", "0", "node1", "29500"), strict=True))
        environment(SRUN | given)
        assert complete_launch_environment() == 4
        assert {name: os.environ[name] for name in PLACE} == given

    @pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
    def test_a_process_of_its_own(self, given, environment):
        environment(given | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"})  # of a batch script
        assert complete_launch_environment() == 1
        assert [os.environ[name] for name in PLACE[:4]] == ["0", "1", "0", "127.0.0.1"]
        assert int(os.environ["MASTER_PORT"]) > 0

    def test_ranks_of_one_machine_that_name_it(self, environment):
        """In a loop of a batch script, whose own place is not that of what it starts."""
        batch = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
        environment(batch | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"})
        assert complete_launch_environment() == 4
        assert os.environ["LOCAL_RANK"] == "3"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"RANK": "1"}, "WORLD_SIZE is not set, .*deepspeed or torchrun"),
            ({"WORLD_SIZE": "2"}, "RANK is not set, .*deepspeed or torchrun"),
            ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set, and 2 ranks .* export MASTER_ADDR=<"),
            ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"}, "MASTER_PORT is not set"),
            ({"RANK": "1", "WORLD_SIZE": "2"} | ADDRESS, "LOCAL_RANK is not set, .*export it"),
            ({"RANK": "one", "WORLD_SIZE": "2"} | ADDRESS, "RANK=one: a number"),
            ({"RANK": "²", "WORLD_SIZE": "2"} | ADDRESS, "RANK=²: a number"),
            ({"RANK": "", "WORLD_SIZE": "2"} | ADDRESS, "RANK=: a number"),
            ({"RANK": "0", "WORLD_SIZE": "0"} | ADDRESS, "RANK=0 with WORLD_SIZE=0"),
            ({"RANK": "0", "WORLD_SIZE": "2"} | ADDRESS | {"MASTER_PORT": "http"}, "MASTER_PORT=http: a number"),
            ({"RANK": "0", "WORLD_SIZE": "2"} | ADDRESS | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: a port from"),
            ({"RANK": "2", "WORLD_SIZE": "2"} | ADDRESS, "RANK=2 with WORLD_SIZE=2: ranks are numbered"),
            (SRUN, "MASTER_ADDR is not set, and 8 ranks"),
        ],
    )
    def test_what_cannot_be_known_is_named_with_its_remedy(self, given, message, environment):
        environment(given)
        with pytest.raises(UserError, match=message):  # every rank prints it: who could not be told apart
            complete_launch_environment()


@pytest.mark.parametrize(
    ("given", "rank"),
    [
        ({}, 0),
        (SRUN, 5),
        (OPEN_MPI, 5),
        ({"RANK": "3"}, 0),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 3),
        (SRUN | {"RANK": "3"}, 3),
        ({"RANK": "x"}, 0),
    ],
)
def test_the_rank_before_the_ranks_have_joined(given, rank, environment):
    """One of them prints what all find out."""
    environment(given)
    assert launched_rank() == rank


@pytest.mark.parametrize(
    ("local_rank", "gpus", "visible", "device"),
    [("1", 2, None, "cuda:1"), ("1", 2, "4,5", "cuda:1"), ("3", 1, "3", "cuda:0"), ("0", 0, None, "cpu")],
)
def test_one_gpu_per_rank(local_rank, gpus, visible, device, environment, monkeypatch):
    environment({"LOCAL_RANK": local_rank} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert local_device() == torch.device(device)
    if gpus:
        number_gpu(local_device())
        assert os.environ["LOCAL_RANK"] == device.removeprefix("cuda:")  # DeepSpeed takes it for the GPU's number
        assert local_device() == torch.device(device)


def test_more_ranks_than_gpus(environment, monkeypatch):
    environment({"LOCAL_RANK": "1"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="LOCAL_RANK=1, but this process sees 1 GPUs"):
        local_device()


def _join(place: dict[str, str], seconds: float) -> tuple[str, str]:
    os.environ.update(place)
    process_group.START = timedelta(seconds=seconds)
    try:
        join_process_group()
    except UserError as error:
        return type(error).__name__, str(error)


def _prepare(place: dict[str, str]) -> tuple[str, str]:
    os.environ.update(place)
    try:
        with launched("agrepa prepare"):
            pass
    except UserError as error:
        return type(error).__name__, str(error)


class TestRanksThatDoNotJoin:
    def test_a_port_in_use_is_said_to_be_so(self):
        with socket.socket() as listener:
            listener.bind(("0.0.0.0", 0))
            listener.listen()
            port = listener.getsockname()[1]
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            for (ended,) in (fork_ranks(1, _join, place, 60.0), fork_ranks(1, _prepare, place | {"WORLD_SIZE": "2"})):
                assert ended.value is not None, ended.output
                kind, line = ended.value
                assert kind == "UserError"
                assert f"port {port} of this machine is in use" in line
                assert "--master_port" in line
                assert "\n" not in line

    @pytest.mark.parametrize("name", ["no.such.host.invalid", "a" * 70, "é.." + "b" * 70])
    def test_a_machine_without_an_address_is_named(self, name, environment):
        environment({"MASTER_ADDR": name})
        with pytest.raises(UserError, match=f"MASTER_ADDR={name}: no address is known for it"):
            check_master_address(patience=-1)

    def test_a_rank_that_is_not_started_is_not_waited_for_without_end(self):
        (ended,) = fork_ranks(1, _join, {"WORLD_SIZE": "2"}, 1.0)
        kind, line = ended.value
        assert kind == "UserError"
        assert "the 2 ranks did not find each other at 127.0.0.1:" in line
        assert "start all of them" in line


def test_ranks_do_not_wait_to_agree_on_the_end_of_one_of_them(monkeypatch):
    monkeypatch.setattr(Ranks, "_exchange", lambda *_: pytest.fail("waits again"))
    closed = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="Connection closed"), Ranks(0, 2).agreeing():
        raise closed


def _started_by_srun() -> dict:
    place = {"SLURM_PROCID": "RANK", "SLURM_STEP_NUM_TASKS": "WORLD_SIZE", "SLURM_LOCALID": "LOCAL_RANK"}
    os.environ.update({name: os.environ.pop(ours) for name, ours in place.items()})
    join_process_group()
    rank, failures = dist.get_rank(), []

    def fails() -> None:
        raise UserError(f"rank {rank} objects")

    try:
        on_rank_0(lambda: Lock())  # a result that cannot be sent stays where it is
        on_rank_0(fails)
    except UserError as error:
        failures.append(str(error))
    learnt = {
        "ranks": all_gather((rank, os.environ["LOCAL_RANK"])),
        "of rank 0": from_rank_0(lambda: {"rank": rank}),
        "failures": failures,
        "first": first_failure("rank 1 is ill" if rank == 1 else None),
        "none": first_failure(None),
    }
    dist.destroy_process_group()
    return learnt


def test_ranks_under_srun_join_and_agree():
    ended = fork_ranks(2, _started_by_srun)
    assert [rank.code for rank in ended] == [0, 0], ended
    learnt = {
        "ranks": [(0, "0"), (1, "1")],
        "of rank 0": {"rank": 0},
        "failures": ["rank 0 objects"],
        "first": "rank 1 is ill",
        "none": None,
    }
    assert [rank.value for rank in ended] == [learnt, learnt]
