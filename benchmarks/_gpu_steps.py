"""The parts of gpu_suite.py that train: the demo, the step through DeepSpeed, the step without it, and their traces."""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from _plan import Plan
from _results import ROOT
from _timing import time_steps
from _training import OurStep, Sizes, awake_model, graphed, random_clips

from agrepa_fast.alignment.aligner import Aligner
from agrepa_fast.config import Config, DataConfig, TrainConfig
from agrepa_fast.data.batch import PackedBatch
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.device import SideStream
from agrepa_fast.kernels import force_backend
from agrepa_fast.training.captured_step import GraphedLosses
from agrepa_fast.training.context import RunContext
from agrepa_fast.training.run import Run
from agrepa_fast.zero.ds_config import find_ds_config, resolve_ds_config
from agrepa_fast.zero.ema import Ema
from agrepa_fast.zero.engine import build_engine
from agrepa_fast.zero.optimizers import optimizer_inside
from agrepa_fast.zero.process_group import join_process_group

Measured = Iterator[tuple[str, object]]
ROUNDS = 5
TOP_KERNELS = 30


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def demo(plan: Plan) -> Measured:
    """The demo as users train it, ZeRO-2 with probes and steps as CUDA graphs; then again from a checkpoint of it."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"run.dir={folder}/run"
        settings = ["--ds_config", "zero2.json", run, *plan.overrides]
        if plan.preset == "demo":
            settings.append(f"data.path={plan.shards}")
        yield "trained", _train("--preset", plan.preset, *settings)
        yield "resumed", _train("--resume", f"step{plan.resume:08d}", *settings)


def _train(*arguments: str) -> dict[str, object]:
    """Run train.py and return what its output and summary say. Raises RuntimeError with the end of its output if it
    fails."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "agrepa_fast" / "train.py"), *arguments]
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))  # a checkout is enough
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    output = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"train.py ended with exit code {done.returncode}\n{output[-3000:]}")
    folder = next(part for part in arguments if part.startswith("run.dir=")).removeprefix("run.dir=")
    summary = json.loads((Path(folder) / "summary.json").read_text())
    graphs = re.search(r"CUDA graphs: (\d+) captured, (\d+) replays", output)
    return {
        "probes that failed": output.count("probe failed"),
        "graphs captured, replayed": [int(number) for number in graphs.groups()] if graphs else [0, 0],
        "selection": summary["selection"],
        "seconds": round(time.perf_counter() - start, 1),
        **{name: summary[name] for name in ("val/flow_loss", "clips_per_s_median", "device", "precision")},
    }


class DeepSpeedStep:
    """One rank's real optimizer step through DeepSpeed, ZeRO stage 2, on one batch as the loader gives it."""

    def __init__(self, s: Sizes):
        device = join_process_group()
        train = TrainConfig(batch_clips=s.batch, graphs=0)
        config = Config(model=s.model, data=DataConfig(n_mels=s.mels), train=train)
        ds_config = resolve_ds_config(find_ds_config("zero2.json"), train, BatchLayout(s.batch, 1, 0, 1), device)
        self.engine = build_engine(awake_model(s, torch.float32), config, ds_config)
        aligner = Aligner(config, self.engine.module, {"speech": s.speech_teacher, "audio": s.audio_teacher}, device)
        aligner.select(s.selection)
        ignored = {name: lambda *_, **__: None for name in ("add", "count_batch", "skip")}
        metrics = SimpleNamespace(**ignored, print=print)
        choice = SimpleNamespace(aligner=aligner, keep_gradient_norms=lambda *_: None)  # nothing is measured here
        index = SimpleNamespace(domains=())  # the one batch comes from no shards
        context = RunContext(config, index, device, 0, 1, Path())
        self.run = Run(context, self.engine, Ema(self.engine, train.ema_decay), choice, metrics)
        self.engine.module.train()
        packed = _packed_clips(s)
        self.pageable = packed.unpack()
        self.batch = packed.pin_memory().unpack() if device.type == "cuda" else self.pageable

    def __call__(self) -> None:
        self.run.step(repeat(self.batch), 0)

    def changes(self) -> dict[str, Callable[[], AbstractContextManager]]:
        """Return what the engine changes about DeepSpeed's step, and a context in which it is as before."""
        optimizer, at_once = self.engine.optimizer, SideStream(torch.device("cpu"))

        def deepspeeds(name: str) -> Callable[[], AbstractContextManager]:
            return partial(patch.object, optimizer, name, getattr(type(optimizer), name).__get__(optimizer))

        return {
            "no overflow pass": deepspeeds("check_overflow"),
            "norm in fp32": deepspeeds("get_grad_norm_direct"),
            "AdamW fused": partial(_unfused, optimizer_inside(self.engine)),
            "EMA beside the forward": partial(patch.object, self.run.ema, "_side", at_once),
            "batch copied beside the step": partial(patch.object, self.run, "_copies", at_once),
            "batch pinned": partial(patch.object, self, "batch", self.pageable),
        }


def _packed_clips(s: Sizes) -> PackedBatch:
    """Return random clips as a loader hands them over."""
    clips, places = random_clips(replace(s, device="cpu"), s.batch), tuple(range(s.batch))
    condition = clips.condition
    tensors = {"mel": clips.mel, "zero": torch.zeros(1, 1, 1), "domain": clips.domain, **clips.teacher}
    tensors |= {name: getattr(condition, name) for name in ("tokens", "token_lengths", "lengths")}
    packed = PackedBatch.zeros(
        {name: (x.dtype, x.shape) for name, x in tensors.items()}, tuple(map(str, places)), places
    )
    for name, values in tensors.items():
        packed.tensor(name).copy_(values)
    return packed


@contextmanager
def _unfused(optimizer: torch.optim.AdamW) -> Iterator[None]:
    """Inside it, AdamW is PyTorch's default for the device, with its counts of updates on the host."""

    def move(fused: bool | None, device: torch.device) -> None:
        for group in optimizer.param_groups:
            group["fused"] = fused
        for state in optimizer.state.values():
            state["step"] = state["step"].to(device)

    fused, device = optimizer.param_groups[0]["fused"], next(iter(optimizer.state.values()))["step"].device
    move(None, torch.device("cpu"))
    try:
        yield
    finally:
        move(fused, device)


def zero2(plan: Plan) -> Measured:
    """The real step: as it is, with each change to DeepSpeed's step taken back, with all taken back, and as a graph."""
    step = DeepSpeedStep(plan.sizes)
    step()  # AdamW's state exists from here on
    changes = step.changes()

    @contextmanager
    def all_taken_back() -> Iterator[None]:
        with ExitStack() as stack:
            for taken_back in changes.values():
                stack.enter_context(taken_back())
            yield

    inside = {"eager": nullcontext} | {f"without: {name}": taken_back for name, taken_back in changes.items()}
    inside["without all"] = all_taken_back
    if plan.cuda:
        inside["train.graphs"] = partial(patch.object, step.run, "graphs", GraphedLosses(step.run._trained, 2, print))
    yield from time_steps(dict.fromkeys(inside, step), ROUNDS, inside=inside).items()


def step(plan: Plan) -> Measured:
    """The optimizer step without DeepSpeed, eager and as a CUDA graph, on padded clips, on the reference backend, and
    with 1.5B parameters."""
    s = plan.sizes
    for clips in (s.batch, s.small_batch):
        yield from _eager_and_graphed(s, clips)
        free()
    yield f"padded B{s.batch}", time_steps({"step": OurStep(s, s.batch, padded=True)}, ROUNDS)["step"]
    free()
    with force_backend("reference"):
        yield from _timed(s, s.batch, reference=OurStep(s, s.batch))
    free()
    wide = replace(s, dim=plan.wide[0], depth=plan.wide[1])
    for clips in (s.batch, s.batch // 2):
        try:
            ours = OurStep(wide, clips)
            parameters = sum(weight.numel() for weight in ours.weights)
            for _, result in _timed(wide, clips, wide=ours):
                yield "wide", result | {"parameters": parameters, "clips": clips}
            return
        except torch.OutOfMemoryError:  # again with half as many clips; the result holds their number
            ours = None
        free()


def _eager_and_graphed(s: Sizes, clips: int) -> Measured:
    ours = OurStep(s, clips)
    calls = {"ours": ours}
    if s.device == "cuda":
        losses = [ours() for _ in range(4)]
        ours = calls["ours"] = OurStep(s, clips)
        calls["graphed"], loss = graphed(ours)  # three steps of warm-up; the replay is the fourth
        calls["graphed"]()
        yield f"graphed B{clips} loss difference", float((loss - losses[3]).abs() / losses[3].abs())
    yield from _timed(s, clips, **calls)


def _timed(sizes: Sizes, clips: int, **calls: Callable[[], object]) -> Measured:
    for name, result in time_steps(calls, ROUNDS).items():
        took = result["median_s"]
        rates = {"clips_per_s": clips / took, "tflop_per_s": clips * sizes.clip_flops() / took / 1e12}
        yield f"{name} B{clips}", result | rates


def traces(plan: Plan) -> Measured:
    """A torch profiler trace and the longest kernels of one step, without and with DeepSpeed, as files in plan.out."""
    yield "step", _trace("step", OurStep(plan.sizes, plan.sizes.batch), plan)
    free()
    yield "zero2", _trace("zero2", DeepSpeedStep(plan.sizes), plan)


def _trace(name: str, call: Callable[[], object], plan: Plan) -> dict[str, object]:
    """Write the trace of one call, after three others, and return its kernels."""
    for _ in range(3):
        call()
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * plan.cuda
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        if plan.cuda:
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(plan.out / f"trace_{name}.json.gz"))
    averages = profile.key_averages()
    order = "self_cuda_time_total" if plan.cuda else "self_cpu_time_total"
    (plan.out / f"operators_{name}.txt").write_text(averages.table(sort_by=order, row_limit=60))
    kernels = sorted((e for e in averages if "CUDA" in str(e.device_type)), key=lambda e: -e.self_device_time_total)
    return {
        "kernels": sum(e.count for e in kernels),
        "kernels_ms": sum(e.self_device_time_total for e in kernels) / 1e3,
        "longest": [[e.key[:80], e.count, e.self_device_time_total / 1e3] for e in kernels[:TOP_KERNELS]],
    }


PARTS: dict[str, Callable[[Plan], Measured]] = {part.__name__: part for part in (demo, zero2, step, traces)}
