"""How batches travel: one buffer to a device, and loader processes that are spawned, signalled, killed and closed."""

import atexit
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from agrepa_fast.config import DataConfig
from agrepa_fast.data.batch import collate, pack
from agrepa_fast.data.index import load_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches, _LoaderContext
from agrepa_fast.data.plan import BatchPlan
from agrepa_fast.data.reading import fixed_clips
from agrepa_fast.errors import UserError
from agrepa_fast.train import explain

from ..ranks import ROOT
from ..testing import write_small_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "shards"
    write_small_shards(folder)
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return load_index(folder)


def all_tensors(batch) -> list[torch.Tensor]:
    found = []
    batch.map(lambda tensor: found.append(tensor) or tensor)
    return found


def samples(index):
    return fixed_clips(index, "val", "speech", 2) + fixed_clips(index, "val", "audio", 1)


def test_the_tensors_of_a_batch_are_aligned_views_of_one_buffer(index):
    packed = pack(samples(index), (0, 1, 2), index)
    batch = packed.unpack()
    tensors = all_tensors(batch)
    assert len(tensors) == 8
    assert {t.untyped_storage().data_ptr() for t in tensors} == {packed.buffer.data_ptr()}
    assert all((t.data_ptr() - packed.buffer.data_ptr()) % 16 == 0 for t in tensors)
    assert packed.buffer.data_ptr() % 16 == 0
    condition, teacher = batch.condition, batch.teacher.values()
    assert {t.dtype for t in (batch.mel, condition.reference, *teacher)} == {torch.float32}
    ids = (batch.domain, condition.tokens, condition.token_lengths, condition.lengths)
    assert {t.dtype for t in ids} == {torch.int64}
    assert condition.reference.shape == batch.mel.shape
    assert not condition.reference.any()
    filled = sum(t.nbytes for t in tensors if t is not condition.reference)
    assert filled < packed.buffer.nbytes < filled + 64 * len(tensors)


def test_a_batch_reaches_a_device_by_one_asynchronous_copy(index, monkeypatch):
    batch, copies, to = collate(samples(index), (0, 1, 2), index), [], torch.Tensor.to

    def spy(tensor, device, **options):
        copies.append((tensor.nbytes, options))
        return to(tensor, device, **options)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    moved = batch.to("meta")
    assert copies == [(batch.mel.untyped_storage().nbytes(), {"non_blocking": True})]
    layout = [(t.shape, t.dtype, t.stride()) for t in all_tensors(batch)]
    assert [(t.shape, t.dtype, t.stride()) for t in all_tensors(moved)] == layout
    assert {t.device.type for t in all_tensors(moved)} == {"meta"}
    assert moved.condition.padded == batch.condition.padded
    copies.clear()
    drawn = replace(batch, condition=replace(batch.condition, reference=torch.ones_like(batch.mel)))
    assert drawn.to("meta").condition.reference.shape == batch.mel.shape
    assert len(copies) == 2  # a tensor of another buffer moves by itself


def test_a_batch_on_the_cpu_stays_where_it_is(index):
    batch = collate(samples(index), (0, 1, 2), index)
    for before, after in zip(all_tensors(batch), all_tensors(batch.to("cpu")), strict=True):
        assert torch.equal(before, after)
        assert before.data_ptr() == after.data_ptr()


def test_pinning_copies_the_buffer_once(index, monkeypatch):
    pinned = []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    packed = pack(samples(index), (0, 1, 2), index)
    tensors = all_tensors(packed.pin_memory().unpack())
    assert len(pinned) == 1
    assert {t.untyped_storage().data_ptr() for t in tensors} == {pinned[0].data_ptr()}
    for before, after in zip(all_tensors(packed.unpack()), tensors, strict=True):
        assert torch.equal(before, after)


def test_a_plan_can_be_pickled(index):
    plan = BatchPlan(index, 0.4, 3, clips=7)
    wanted = [plan.batch(step) for step in range(20)]
    assert [pickle.loads(pickle.dumps(plan)).batch(step) for step in range(20)] == wanted


UNGUARDED = """
import sys
print("imported as", __name__, flush=True)
from agrepa_fast.data.index import load_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
heavy = {"deepspeed", "transformers", "matplotlib", "scipy", "yaml", "pydantic", "triton"}
print("heavy:", sorted(heavy & sys.modules.keys()))
from agrepa_fast.config import DataConfig
batches = TrainBatches(load_index(sys.argv[1]), DataConfig(workers=1), BatchLayout(4, 1, 0, 1), seed=0, center=True)
print(next(batches).keys)
batches.close()
"""


def test_a_loader_process_imports_neither_the_main_program_nor_heavy_packages(folder, tmp_path):
    """An unguarded script would start loader processes in its loader processes, train.py would import DeepSpeed."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    command = [sys.executable, str(script), str(folder)]
    output = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    lines = output.stdout.splitlines()
    assert lines[:2] == ["imported as __main__", "heavy: []"]
    assert len(lines) == 3


def start(index, workers: int) -> TrainBatches:
    return TrainBatches(index, DataConfig(workers=workers), BatchLayout(4, 1, 0, 1), seed=0, center=True)


def test_shards_that_cannot_be_read_are_one_line_from_a_loader_process_too(tmp_path):
    """However long their names are."""
    folder = tmp_path / ("long" * 50) / ("name" * 50)
    write_small_shards(folder)
    index, lines = load_index(folder), []
    for file in folder.glob("train-*.tar"):
        file.write_bytes(b"")
    for workers in (0, 1):
        batches = start(index, workers)
        with pytest.raises(UserError) as refused:
            next(batches)
        lines.append(str(refused.value))
        batches.close()
    assert lines[0] == lines[1]
    assert lines[0].startswith(str(folder))


def test_loader_processes_outlive_a_scheduler_s_signals_and_end_on_close(index, monkeypatch):
    """The signals come while the processes start; one of them hangs when it should end."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    batches, alone = start(index, 2), start(index, 0)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked
    for process in batches._context.processes:
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGUSR1)
    assert [next(batches).keys for _ in range(6)] == [next(alone).keys for _ in range(6)]
    hanging = batches._context.processes[0]
    assert hanging.is_alive()
    os.kill(hanging.pid, signal.SIGSTOP)
    batches.close()
    for process in batches._context.processes:
        process.join(20)
        assert not process.is_alive()
    assert hanging.exitcode == -signal.SIGKILL


def test_a_loader_process_that_is_killed_is_named(index):
    batches = start(index, 1)
    next(batches)

    def killed() -> None:
        os.kill(batches._context.processes[0].pid, signal.SIGKILL)  # the handler of SIGCHLD may raise here
        all(next(batches) for _ in range(1000))

    with pytest.raises(RuntimeError, match="DataLoader worker") as raised:
        killed()
    assert explain(raised.value).startswith("a loader process ended")
    batches.close()


def test_a_loader_process_ends_without_finalization():
    context = _LoaderContext()
    process = context.Process(target=atexit.register, args=(os.abort,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
