"""The goals of the project that one GPU can answer, read off the results of gpu_suite.py."""

from collections.abc import Iterator

from _bench import ratio

PEAK_TFLOP_PER_S = 989  # H100 SXM, dense bf16
PROBE_EVERY = 200  # steps
BATCH, SMALL, BLOCK = 16, 4, "1024x938x16"  # of the real sizes; a dry run has others and answers less

Goal = tuple[int, str, float | None, str, float, float]  # number, what, measured, at least or at most, goal, stretch


def verdict(measured: float | None, sign: str, goal: float, stretch: float) -> tuple[str, str, str, str]:
    """(measured, wanted, stretch, met | missed | not measured) as text."""
    wanted, further = f"{sign} {goal:g}", f"{sign} {stretch:g}"
    if measured is None:
        return "", wanted, further, "not measured"

    def reached(value: float) -> bool:
        return {">=": measured >= value, "<=": measured <= value, "==": measured == value}[sign]

    word = "missed" if not reached(goal) else "met, and the stretch" if reached(stretch) else "met"
    return f"{measured:.3g}", wanted, further, word


def goals(results: dict) -> Iterator[Goal]:
    for part in (_kernels, _step, _probe, _alignment, _teachers_and_graphs):
        yield from part(results)


def _find(results: dict | None, *path: str):
    """results[path[0]][path[1]]..., or None where something on the way was not measured."""
    for key in path:
        if not isinstance(results, dict) or key not in results:
            return None
        results = results[key]
    return results


def _seconds(results: dict, *path: str) -> float | None:
    return _find(results, *path, "both", "median_s") or _find(results, *path, "median_s")


def _quotient(a: float | None, b: float | None, factor: float = 1.0) -> float | None:
    return None if a is None or not b else factor * a / b


def _over(results: dict, part: str, name: str, base: str, method: str) -> float | None:
    return ratio(_find(results, part, name) or {}, base, method)


def _kernels(results: dict) -> Iterator[Goal]:
    copy = _find(results, "ceilings", "copy_60k_tokens_gb_per_s")
    for phase, wanted in (("forward", (85, 90)), ("backward", (75, 85))):
        speed = _find(results, "ops", "gated_residual 60k", "fused", phase, "gb_per_s")
        yield 1, f"gated_residual {phase}, 60k tokens, % of copy", _quotient(speed, copy, 100), ">=", *wanted
    for base, wanted in (("torch.compile", (1.25, 1.5)), ("eager", (2.5, 3.0))):
        yield 2, f"norm/gate chain over {base}", _over(results, "ops", "chain", base, "fused"), ">=", *wanted
    bases = {
        "torch.compile": (1.04, 1.08),  # the reference backend: cuDNN first
        "torch.compile, default SDPA": (1.10, 1.15),
        "eager, default SDPA": (1.2, 1.27),
    }
    for base, wanted in bases.items():
        yield 3, f"block over {base}", _over(results, "block", BLOCK, base, "ours"), ">=", *wanted


def _step(results: dict) -> Iterator[Goal]:
    step = _find(results, "step")
    for name, what, wanted in (("ours B16", "step", (38, 43)), ("wide", "step at 1.5B", (41, 46))):
        rate = _find(step, name, "tflop_per_s")
        yield 4, f"{what}, % MFU of {PEAK_TFLOP_PER_S}", _quotient(rate, PEAK_TFLOP_PER_S, 100), ">=", *wanted
    clips = _find(step, f"ours B{BATCH}", "clips_per_s")
    recipe = _find(results, "released", "released", "clips_per_s")
    yield 5, "clips/s over the released recipe", _quotient(clips, recipe), ">=", 10, 15
    better = _find(results, "released", "with bf16, SDPA and cached teachers", "clips_per_s")
    yield 5, "over it with bf16, SDPA, cached teachers", _quotient(clips, better), ">=", 1.4, 1.6


def _probe(results: dict) -> Iterator[Goal]:
    probe = _seconds(results, "foga", "prefix-shared")
    step = _seconds(results, "step", f"ours B{BATCH}")
    yield 6, "FoG-A block forwards", _find(results, "foga", "block_forwards"), "==", 300, 300
    yield 6, "FoG-A over stacked gates", _quotient(_seconds(results, "foga", "stacked"), probe), ">=", 1.8, 1.95
    yield 6, "FoG-A over sequential, 2 clips", _quotient(_seconds(results, "foga", "sequential"), probe), ">=", 2.5, 3
    share = _quotient(probe, step, 100 / PROBE_EVERY)
    yield 7, f"a probe every {PROBE_EVERY} steps, % of wall time", share, "<=", 0.3, 0.26
    memory = _find(results, "foga", "prefix-shared", "peak_memory_mib")
    yield 7, "probe, extra GB", _quotient(memory, 1e9 / 2**20), "<=", 1, 1
    sync = _find(results, "foga", "host_sync")
    yield 7, "probe waits for the host (1: yes)", None if sync is None else float(bool(sync)), "<=", 0, 0


def _alignment(results: dict) -> Iterator[Goal]:
    step = _seconds(results, "step", f"ours B{BATCH}")
    parts = (("pooled", "pooled, two domains", 2, (1, 0.3)), ("frames", "frame-wise, 3 heads", 1, (4, 4)))
    for name, what, times, wanted in parts:
        share = _quotient(_seconds(results, "alignment", name, "fused"), step, 100 * times)
        yield 8, f"{what}, % of the step", share, "<=", *wanted
    speed = _over(results, "alignment", "frames", "eager", "fused")
    yield 8, "frame-wise over an eager head", speed, ">=", 1.6, 2.2
    memory = [_find(results, "alignment", "frames", method, "peak_memory_mib") for method in ("eager", "fused")]
    yield 8, "frame-wise, extra memory of eager over ours", _quotient(*memory), ">=", 10, 30


def _teachers_and_graphs(results: dict) -> Iterator[Goal]:
    step = _seconds(results, "step", f"ours B{BATCH}")
    mixes = {"half speech": (("whisper half", "beats half"), (1.4, 1.5)), "speech only": (("whisper",), (1.8, 1.9))}
    for mix, (teachers, wanted) in mixes.items():
        times = [step, *(_seconds(results, "released", f"{name}, run's precision") for name in teachers)]
        online = None if None in times else sum(times)
        yield 9, f"cached over online bf16 teachers, {mix}", _quotient(online, step), ">=", *wanted
    yield 10, "loader, clips/s a worker (a benchmark of its own)", None, ">=", 900, 3000
    for clips, wanted in ((SMALL, (1.15, 1.3)), (BATCH, (1.0, 1.0))):
        eager, graph = (_seconds(results, "step", f"{kind} B{clips}") for kind in ("ours", "graphed"))
        yield 11, f"CUDA-graphed step over eager, B = {clips}", _quotient(eager, graph), ">=", *wanted
