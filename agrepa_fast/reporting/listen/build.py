"""agrepa listen RUN RUN …: a blind test as one page, and answers.json, which names the system of each clip."""

import hashlib
import hmac
import json
import random
import secrets
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from ...errors import UserError
from ...files import check_writable, write_atomically
from ..page.document import LIMIT, write_page
from ..page.media import flac_uri
from .material import ANCHOR, TRUTH, Material, read_material
from .stimuli import at_loudness, common_loudness, loudness, low_passed, read_waves

PAGE, ANSWERS = "listen.html", "answers.json"
FORMAT = "agrepa listening test 1"
KINDS = ("mos", "pairwise")
_OVERHEAD = 100_000  # bytes of a page without its clips


def make_test(paths: Sequence[Path], out: Path, kind: str, seed: int, clips: int, truth: Path | None = None) -> str:
    """Write out/listen.html and out/answers.json, and return two lines on them.

    kind: mos (one clip at a time on a scale of 1 to 5) or pairwise (which of two clips sounds better). seed: of the
    choice of clips and of the listeners' orders; clips: how many, as evenly over the domains as they allow. Raises
    UserError if the systems do not have the same clips, or the page would be larger than 15 MB.
    """
    material = read_material(paths, truth)
    for name in (PAGE, ANSWERS):
        if (out / name).exists():
            raise UserError(f"--out {out} holds a listening test: its answers would be lost; choose another folder")
    check_writable(out, "--out")
    chosen = _choose(material, clips, seed)
    sounds, wanted = _sounds(material, chosen)
    size = sum(map(len, sounds.values())) + _OVERHEAD
    if size > LIMIT:
        raise UserError(
            f"the page would have {size / 1e6:.1f} MB, above {LIMIT / 1e6:.0f}: about {len(chosen) * LIMIT // size} "
            "clips fit (--clips)"
        )
    key = secrets.token_bytes(16)
    ids = {stimulus: _id(key, "stimulus", *stimulus) for stimulus in sounds}
    trials = _trials(kind, ids, [*material.systems], chosen, key)
    test = hashlib.sha256(json.dumps([kind, seed, sorted(trials), sorted(ids.values())]).encode()).hexdigest()[:16]
    answers = {
        "format": FORMAT,
        "test": test,
        "kind": kind,
        "seed": seed,
        "loudness": round(wanted, 2),
        "key": key.hex(),
        "systems": {name: str(path) for name, path in zip(material.systems, paths, strict=True)},
        "clips": {clip: material.domains.get(clip, "") for clip in chosen},
        "stimuli": {id_: {"clip": clip, "system": system} for (clip, system), id_ in ids.items()},
        "trials": trials,
    }
    shown = {
        "test": test,
        "kind": kind,
        "seed": seed,
        "trials": trials,
        "sounds": {ids[stimulus]: uri for stimulus, uri in sounds.items()},
    }  # the template's tojson sorts both by id, so that no order tells the systems apart
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / ANSWERS, json.dumps(answers, indent=1) + "\n")
    write_page(out / PAGE, PAGE, folders=("listen",), test=shown)
    return (
        f"wrote {out / PAGE}: {len(trials)} ratings of {len(chosen)} clips at {wanted:.1f} LUFS; give listeners this "
        f"file alone\nkeep {out / ANSWERS}: agrepa listen --ratings FOLDER --answers {out / ANSWERS}"
    )


def _choose(material: Material, number: int, seed: int) -> list[str]:
    """Return clips drawn by the seed, the same number of each domain as far as there are as many."""
    draw, by_domain = random.Random(seed), {}
    for clip in sorted(next(iter(material.systems.values()))):
        by_domain.setdefault(material.domains.get(clip, ""), []).append(clip)
    queues = [draw.sample(clips, len(clips)) for _, clips in sorted(by_domain.items())]
    turns = [queue[place] for place in range(max(map(len, queues))) for queue in queues if place < len(queue)]
    return sorted(turns[:number])


def _sounds(material: Material, chosen: Sequence[str]) -> tuple[dict[tuple[str, str], str], float]:
    """Return (clip, system, truth or anchor) -> its sound, and the loudness of all of them."""
    waves, rates, measured = {}, {}, {}
    for clip in chosen:
        files = {name: recordings[clip] for name, recordings in material.systems.items()} | {
            TRUTH: material.truth[clip]
        }
        decoded, rate = read_waves(files)
        decoded[ANCHOR] = low_passed(decoded[TRUTH], rate)
        for name, wave in decoded.items():
            waves[clip, name], rates[clip, name] = wave, rate
            measured[clip, name] = loudness(wave, rate, str(files.get(name, files[TRUTH])))
    wanted = common_loudness(waves, measured)
    return {
        key: flac_uri(np.asarray(at_loudness(wave, measured[key], wanted)), rates[key]) for key, wave in waves.items()
    }, wanted


def _trials(
    kind: str, ids: dict[tuple[str, str], str], systems: Sequence[str], clips: Sequence[str], key: bytes
) -> dict[str, list[str]]:
    """Return trial -> its stimuli. Pairs are those of systems and truth, and of truth and anchor, a check of the
    listener."""
    if kind == "mos":
        return {_id(key, "trial", id_): [id_] for id_ in ids.values()}
    both = [sorted((ids[clip, one], ids[clip, other])) for clip in clips for one, other in rated_pairs(systems)]
    return {_id(key, "trial", *pair): pair for pair in both}


def rated_pairs(systems: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of a pairwise test that each clip is rated in."""
    return [*combinations([*systems, TRUTH], 2), (TRUTH, ANCHOR)]


def _id(key: bytes, *parts: str) -> str:
    return hmac.new(key, "\0".join(parts).encode(errors="surrogatepass"), "sha256").hexdigest()[:16]
