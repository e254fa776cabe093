"""The table that gpu_suite.py prints last: what a GPU run decides, from the results of its parts."""

from collections.abc import Callable, Iterator
from statistics import geometric_mean

from _bench import ratio, total_s

HEADER = ("question", "measured", "wanted", "answer")
PEAK_TFLOPS = 989  # bf16, dense, of an H100
SAME_LOSS = 0.02  # of the loss: two runs on a GPU that sums in varying orders
WORTH = 0.005  # of a step: a change that gains less is not worth its lines
BETTER_TILE = 0.02
PROBE_EVERY = 200  # steps
Row = tuple[str, str, str, str]


def decide(results: dict[str, dict]) -> list[Row]:
    """Return the rows of the table. results: of gpu_suite.py, by part."""
    rows: list[Row] = []
    for question in QUESTIONS:
        try:
            for row in question(results):
                rows.append(row)
        except (LookupError, RuntimeError, ValueError):  # a part, or a method of it, gave nothing
            rows.append((question.__doc__.rstrip("."), "not measured", "", ""))
    return rows


def _goal(what: str, value: float | None, least: float, unit: str = "x", digits: int = 2) -> Row:
    if value is None:
        return what, "not measured", f">= {least}{unit}", ""
    return what, f"{value:.{digits}f}{unit}", f">= {least}{unit}", "met" if value >= least else "missed"


def _limit(what: str, value: float, most: float, unit: str, digits: int = 2) -> Row:
    return what, f"{value:.{digits}f}{unit}", f"<= {most}{unit}", "met" if value <= most else "missed"


def _yes(what: str, measured: str, wanted: str, right: bool) -> Row:
    return what, measured, wanted, "yes" if right else "NO"


def demo(results: dict) -> Iterator[Row]:
    """Do probes, graphs and a resume work in a real run."""
    trained = results["demo"]["trained"]
    captured, replayed = trained["graphs captured, replayed"]
    failed = trained["probes that failed"]
    text = f"{failed} failed; {captured} graphs captured, {replayed} replays; aligned {trained['selection']}"
    works = not failed and captured > 0 and trained["selection"] is not None
    yield _yes("probes and graphs in a run", text, "none failed", works)
    first, last = (trained["val/flow_loss"][name] for name in ("first", "last"))
    again = results["demo"]["resumed"]["val/flow_loss"]["last"]
    yield _yes("the demo learns", f"{first:.3f} to {last:.3f}", "-30 %", last < 0.7 * first)
    yield _yes("a resumed run ends alike", f"{last:.4f}, {again:.4f}", "2 %", abs(again / last - 1) <= SAME_LOSS)


def accuracy(results: dict) -> Iterator[Row]:
    """Are the compiled kernels accurate."""
    tests = [value for value in results["accuracy"].values() if isinstance(value, dict)]
    passed, failed = sum(t["passed"] for t in tests), sum(len(t["failed"]) for t in tests)
    if passed or failed:
        yield _yes("kernels are accurate", f"{passed} passed, {failed} failed", "0 failed", passed > 0 and not failed)


def zero2(results: dict) -> Iterator[Row]:
    """Is each change to DeepSpeed's step worth it."""
    timed = results["zero2"]
    base = timed["eager"]["median_s"]
    for name, value in timed.items():
        if name.startswith("without") or name == "train.graphs":
            gain = 1 - base / value["median_s"] if name.startswith("without") else 1 - value["median_s"] / base
            text = f"{1e3 * base:.1f} ms, {1e3 * value['median_s']:.1f} {name}"
            yield f"ZeRO-2 step, {name}", text, f"gain >= {WORTH:.1%}", f"keep, {gain:.1%}" if gain >= WORTH else "drop"


def tiles(results: dict) -> Iterator[Row]:
    """Which tiles are fastest, and do they fill the memory's bandwidth."""
    copy = results["ceilings"]["copy_60k_tokens_gb_per_s"]
    timed = {name: value for name, value in results["tiles"].items() if isinstance(value, dict)}
    for kernel in dict.fromkeys(name.split()[0] for name in timed):
        sizes = [value for name, value in timed.items() if name.split()[0] == kernel]
        now = next(iter(sizes[0]))
        gains = {
            tile: geometric_mean(size[now]["median_s"] / size[tile]["median_s"] for size in sizes)
            for tile in sizes[0]
            if all("median_s" in size[tile] for size in sizes)
        }
        best = max(gains, key=gains.get)
        answer = f"take {best}" if gains[best] > 1 + BETTER_TILE else "keep"
        yield f"{kernel}, tile", f"{now} now; {best} {gains[best] - 1:+.1%}", f"> {BETTER_TILE:.0%}", answer
        share = 100 * sizes[0][now]["gb_per_s"] / copy
        yield _goal(f"{kernel}, of a copy's bandwidth", share, 75 if kernel.endswith("bwd") else 85, " %", 0)


def attention(results: dict) -> Iterator[Row]:
    """Is attention right and fast, with and without padding."""
    for name, methods in results["attention"].items():
        if not isinstance(methods, dict):
            continue
        times = {method: total_s(timing) for method, timing in methods.items()}
        right = {method: took for method, took in times.items() if took is not None}
        best, wrong = min(right, key=right.get), ", ".join(times.keys() - right.keys()) or "none"
        text = f"best {best}, {1e3 * right[best]:.2f} ms; wrong: {wrong}"
        if "attend" in right:
            answer = "keep" if right["attend"] <= 1.05 * right[best] else f"take {best}"
            yield f"attention, {name}", f"{1e3 * right['attend']:.2f} ms, {text}", "within 5 %", answer
        else:
            yield f"attention, {name}", text, "right", "NO"


def block(results: dict) -> Iterator[Row]:
    """Is the block faster than compiled ones."""
    methods = next(value for value in results["block"].values() if isinstance(value, dict))
    for base, least in (("torch.compile", 1.04), ("torch.compile, flash", 1.1), ("eager", 1.2)):
        yield _goal(f"block over {base}", ratio(methods, base, "ours"), least)


def step(results: dict) -> Iterator[Row]:
    """Is the step near the hardware's limit."""
    timed = {name: value for name, value in results["step"].items() if isinstance(value, dict)}
    batch, small = (name.removeprefix("ours ") for name in timed if name.startswith("ours "))
    best = max(value["tflop_per_s"] for name, value in timed.items() if name in (f"ours {batch}", f"graphed {batch}"))
    yield _goal(f"step {batch}, MFU", 100 * best / PEAK_TFLOPS, 38, " %", 1)
    wide = timed["wide"]
    yield _goal(f"1.5B parameters, {wide['clips']} clips, MFU", 100 * wide["tflop_per_s"] / PEAK_TFLOPS, 41, " %", 1)
    for size, least in ((small, 1.15), (batch, 1.0)):
        yield _goal(f"step {size}, graph over eager", ratio(timed, f"ours {size}", f"graphed {size}"), least)
    yield _goal("step, fused over reference kernels", ratio(timed, f"reference {batch}", f"ours {batch}"), 1.1)
    padded = 1e3 * timed[f"padded {batch}"]["median_s"]
    yield "step of padded clips", f"{padded:.1f} ms, full {1e3 * timed[f'ours {batch}']['median_s']:.1f}", "", ""


def foga(results: dict) -> Iterator[Row]:
    """Is a probe cheap."""
    timed = results["foga"]
    for base, least in (("stacked", 1.8), ("sequential", 2.5)):
        yield _goal(f"FoG-A over {base}, graphs", ratio(timed, base, "prefix-shared"), least)
    yield _limit("FoG-A, memory", timed["prefix-shared MiB"], 1024, " MiB", 0)
    training = PROBE_EVERY * next(v["median_s"] for name, v in results["step"].items() if name.startswith("ours "))
    share = 100 * timed["probe"]["median_s"] / (training + timed["probe"]["median_s"])
    yield _limit("FoG-A, share of training", share, 0.3, " %")
    wait = timed["waits for the GPU"]
    yield _yes("a probe waits for nothing", wait or "no wait", "no wait", not wait)


def ops(results: dict) -> Iterator[Row]:
    """Are the operations faster than compiled ones."""
    for name, methods in results["ops"].items():
        if isinstance(methods, dict):
            least = {"chain": (1.25, 2.5)}.get(name, (1.0, 1.0))
            for base, wanted in zip(("torch.compile", "eager"), least, strict=True):
                yield _goal(f"{name} over {base}", ratio(methods, base, "fused"), wanted)


def alignment(results: dict) -> Iterator[Row]:
    """Is alignment cheap."""
    took = next(value["median_s"] for name, value in results["step"].items() if name.startswith("ours "))
    for name, most in (("pooled", 1.0), ("frames", 4.0)):
        share = 100 * total_s(results["alignment"][name]["fused"]) / took
        yield _limit(f"alignment, {name}, of a step", share, most, " %")
    yield _goal("alignment, frames, over eager", ratio(results["alignment"]["frames"], "eager", "fused"), 1.0)


def fuse(results: dict) -> Iterator[Row]:
    """Is a fused block of F5-TTS faster than the package's."""
    methods = next(value for value in results["fuse"].values() if isinstance(value, dict))
    for base, least in (("f5-tts", 1.2), ("torch.compile", 1.0)):
        yield _goal(f"fused F5 block over {base}", ratio(methods, base, "fused"), least)


QUESTIONS: tuple[Callable[[dict], Iterator[Row]], ...] = (
    demo,
    accuracy,
    zero2,
    tiles,
    attention,
    block,
    step,
    foga,
    ops,
    alignment,
    fuse,
)
