"""Hostile settings: yaml files, overrides and ds_configs that are mutated at random, from a seed.

Each is accepted, or refused by a UserError of one line; an accepted one survives saving. Run many with
`python -m tests.drills.fuzz_settings 20000`; a few are among the tests of every change.
"""

import copy
import dataclasses
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from agrepa_fast.config import PRESETS, Config, TrainConfig
from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.errors import UserError
from agrepa_fast.text_yaml import parse
from agrepa_fast.zero.ds_config import find_ds_config, resolve_ds_config
from agrepa_fast.zero.ds_sections import adopt_sections
from agrepa_fast.zero.refusals import check_ds_config

from .results import record

SECONDS = 5  # that one case may take
TEXTS = (
    *("", " ", "null", "~", "~/a", "~nobody/a", "None", "true", "on", "0010", "1e5", "1_0", "-1", "0", "1.5", "1e400"),
    *("inf", "-.inf", ".nan", "9" * 30, "9" * 5000, "0x10", "1:30", "2024-11-28", "²", "١٢", "[1, 2]", "[[1], 2]"),
    *("[0.5", "{a: 1}", "a: b", "- a", "#", "&a *a", "!!python/name:os.system", "!!int x", "${oc.env:HOME}", "$(id)"),
    *("a\nb", "a\0b", "\x1b[2J", "\ud800", "\u2028", "e\u0301", "x" * 3000, "../..", "/", "s3://a::b", "file://x"),
    *("fixed:", "fixed:1,", "fixed:99999999999999999999", "vq:", "s3:", "vq:~", "'", '"', "\\", "%s", "=", "a=b"),
)
VALUES = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e300, -0.0, "auto", "", [], {}, [1], {"a": 1}),
    *("true", "1e5", "cpu", "nvme", [[]], {"device": "cpu"}, {"enabled": True}, {"enabled": "auto"}, "\0", "x" * 3000),
)
SECTIONS = (
    *("optimizer", "scheduler", "fp16", "bf16", "zero_optimization", "wandb", "amp", "aio", "data_types", "timers"),
    *("communication_data_type", "steps_per_print", "gradient_clipping", "comms_logger", "tensorboard", "elasticity"),
    *("train_batch_size", "gradient_accumulation_steps", "dump_state", "prescale_gradients", "sparse_gradients", "x"),
)
FULL = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": "auto",
    },
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 4000, "warmup_num_steps": 2}},
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "comms_logger": {"enabled": True, "verbose": False},
    "wandb": {"enabled": True, "project": "speech"},
}


@dataclass
class Findings:
    """How the cases of one kind ended. broken: a line per case that did not end as it must."""

    accepted: int = 0
    refused: Counter = field(default_factory=Counter)  # beginning of the line -> cases
    slowest: float = 0.0
    broken: list[str] = field(default_factory=list)


def fuzz(kind: str, count: int, seed: int) -> Findings:
    """Try `count` cases of a kind: yaml, overrides or ds_config."""
    found, draw = Findings(), random.Random(f"{kind} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            case, attempt = KINDS[kind](draw, Path(folder))
            started = time.perf_counter()
            try:
                with _alarm():
                    attempt()
                found.accepted += 1
            except UserError as refusal:
                line = str(refusal)
                found.refused[line[:40]] += 1
                if len(line.splitlines()) != 1 or len(line) > 1100:
                    found.broken.append(f"{number}: {case!r:.300}: {len(line)} characters: {line!r:.300}")
            except Exception as error:
                found.broken.append(f"{number}: {case!r:.300}: {type(error).__name__}: {error!s:.300}")
            found.slowest = max(found.slowest, time.perf_counter() - started)
    return found


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _names() -> list[str]:
    return [
        f"{part.name}.{setting.name}"
        for part in dataclasses.fields(Config)
        for setting in dataclasses.fields(part.default_factory)
    ]


def _text(draw: random.Random) -> str:
    if draw.random() < 0.7:
        return draw.choice(TEXTS)
    return "".join(chr(draw.choice((draw.randrange(128), draw.randrange(0x3000), 0x1F600))) for _ in range(8))


def _overrides(draw: random.Random, folder: Path) -> tuple[object, Callable[[], None]]:
    overrides = []
    for _ in range(draw.randrange(1, 4)):
        name = draw.choice(_names())
        if draw.random() < 0.1:
            name = _mutated(draw, name.encode()).decode(errors="replace")
        overrides.append(f"{name}{'=' * (draw.random() < 0.98)}{_text(draw)}")

    def attempt() -> None:
        _survives(load_config(draw.choice(("demo", "agrepa-a")), overrides), folder)

    return overrides, attempt


def _yaml(draw: random.Random, folder: Path) -> tuple[object, Callable[[], None]]:
    file = folder / "mine.yaml"
    sections = parse((PRESETS / f"{draw.choice(('demo', 'agrepa-a', 'agrepa-b'))}.yaml").read_text())
    for _ in range(draw.choice((1, 1, 2))):
        section, _, name = draw.choice(_names()).partition(".")
        sections.setdefault(section, {})[name] = draw.choice((str, json.dumps))(_text(draw))
    lines = []
    for section, settings in sections.items():
        written = {name: json.dumps(v) if isinstance(v, list) else v for name, v in settings.items()}
        lines += [f"{section}:", *(f"  {name}: {'null' if text is None else text}" for name, text in written.items())]
    if draw.random() < 0.2:
        lines.insert(draw.randrange(len(lines)), draw.choice((*lines, _text(draw))))
    content = "\n".join(lines).encode(errors="surrogatepass")
    if draw.random() < 0.2:
        content = _mutated(draw, content)
    if draw.random() < 0.1:
        encoding = draw.choice(("utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-7"))
        content = content.decode(errors="replace").encode(encoding, "replace")
    file.write_bytes(content)
    return content, lambda: _survives(load_config(file), folder)


def _ds_config(draw: random.Random, folder: Path) -> tuple[object, Callable[[], None]]:
    file = folder / "ds.json"
    source = draw.choice((None, *sorted(PRESETS.glob("*.json"))))
    values = json.loads(json.dumps(FULL) if source is None else source.read_text())
    for _ in range(draw.choice((1, 1, 1, 3))):
        place = draw.choice([values, *(value for value in values.values() if isinstance(value, dict))])
        name = draw.choice([draw.choice(SECTIONS), _text(draw)[:40], *place])
        place[name] = copy.deepcopy(draw.choice(VALUES))
    content = json.dumps(values).encode()
    if draw.random() < 0.2:
        content = _mutated(draw, content)
    file.write_bytes(content)

    def attempt() -> None:
        passed, train, _ = adopt_sections(find_ds_config(str(file)), TrainConfig(batch_clips=8))
        check_ds_config(resolve_ds_config(passed, train, BatchLayout(8, 1, 0, 1), torch.device("cpu")))

    return content, attempt


def _mutated(draw: random.Random, content: bytes) -> bytes:
    """Return the content with a few bytes changed, left out or repeated."""
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 5)):
        place = draw.randrange(len(changed) + 1)
        length = draw.choice((1, 1, 3, 40))
        piece = bytes(draw.choice((draw.randrange(256), ord(draw.choice("{}[]:,'\"&*!#\n- ")))) for _ in range(length))
        changed[place : place + draw.choice((0, length))] = draw.choice((piece, b"", bytes(changed[place:][:40])))
    return bytes(changed)


def _survives(config: Config, folder: Path) -> None:
    save_config(config, folder / "saved.yaml")
    if load_config(folder / "saved.yaml") != config:
        raise AssertionError("is another after saving")


KINDS = {"yaml": _yaml, "overrides": _overrides, "ds_config": _ds_config}


def summary(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Return a line per kind about `count` cases of each, and the cases that did not end as they must."""
    lines, broken = [], []
    for kind in KINDS:
        found = fuzz(kind, count, seed)
        refused = sum(found.refused.values())
        broken += [f"{kind}, seed {seed}, {line}" for line in found.broken]
        lines.append(
            f"- {kind}: {count} cases, {found.accepted} accepted, {refused} refused in one line, "
            f"{len(found.broken)} broken; the slowest took {found.slowest:.2f} s"
        )
    return lines, broken


if __name__ == "__main__":
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    lines, broken = summary(count, seed)
    print("\n".join([*lines, *broken]))
    if "--record" in sys.argv:
        record("Hostile settings", f"python -m tests.drills.fuzz_settings {count} {seed} --record", lines)
    sys.exit(bool(broken))
