"""The demo corpus: recordings in packages of Debian and Ubuntu.

demo_recordings.txt lists them by content, so that every release with the same recordings gives the same corpus, under
other versions and in other folders, too. Debian 12 and 13 and Ubuntu 24.04 have all of them.
"""

import gzip
import math
import re
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from ..config import DataConfig
from ..errors import UserError
from ..fetch import cache_dir, fetch_apt
from ..files import file_sha256
from .recordings import PassedOver, Recording, Source, key_characters, too_many_bad

MANIFEST = Path(__file__).with_name("demo_recordings.txt")
_DIGITS = 32  # of a recording's SHA-256 in the manifest
# Of the recordings in the manifest. Shards of version 0.1 carry the same.
_IDENTITIES = {"speech": "ef3da916bd79e923", "audio": "7aca5c9e67fa3f7e"}
_G722_BYTES_PER_SECOND = 8000
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


@dataclass(frozen=True)
class DemoPackage:
    """A package with recordings of the demo. `licence` is its copyright file's."""

    name: str
    licence: str
    suffix: str  # of its recordings
    prefix: str = ""  # of their keys

    def recording(self, domain: str, name: str, file: Path | None, **fields) -> Recording:
        """Return a recording of the manifest; without a file it has a problem."""
        return Recording(
            name=f"{self.prefix}{key_characters(name)}",
            path=str(file or ""),
            domain=domain,
            source=f"{self.name}/{name}{self.suffix}",
            licence=self.licence,
            problem="" if file else "in no file of the package, or changed",
            **fields,
        )


PROMPTS = DemoPackage("asterisk-core-sounds-en-g722", "CC-BY-SA-3.0", ".g722", "asterisk-")
PROMPT_TEXTS = DemoPackage("asterisk-core-sounds-en", "CC-BY-SA-3.0", ".txt.gz")
SAMPLES = DemoPackage("sonic-pi-samples", "CC0", ".flac", "sonic-pi-")
# Its copyright file: sound effects are also under CC-BY-SA-2.0.
GAME_SOUNDS = DemoPackage("lincity-ng-data", "GPL-2+", ".wav", "lincity-")
DEMO_PACKAGES = {"speech": (PROMPTS, PROMPT_TEXTS), "audio": (SAMPLES, GAME_SOUNDS)}


def demo_sources(data: DataConfig) -> list[Source]:
    """Return the demo corpus, one source per domain. Fetches nothing before its recordings are asked for."""
    sources = []
    for domain, packages in DEMO_PACKAGES.items():
        listed = cache(partial(_list_demo, domain, data.max_seconds, data.min_seconds))
        recordings, passed_over = (lambda listed=listed, part=part: listed()[part] for part in range(2))
        sources.append(Source(domain, "demo", _IDENTITIES[domain], recordings, passed_over))
        for package in packages:
            print(f"{domain}: {package.name}, {package.licence}")
    return sources


def demo_recordings(domain: str, max_seconds: float, min_seconds: float) -> list[Recording]:
    """Return the demo corpus of one domain. Fetches its packages on first use.

    Speech: spoken prompts of at least 1 s. Audio: sound effects and instrument samples, those longer than `max_seconds`
    cut into consecutive clips of that length, since there are few of them; a rest below `min_seconds` is left out.
    Recordings that the fetched version lacks are printed in one line and have a problem. Raises UserError if too many
    are missing.
    """
    return _list_demo(domain, max_seconds, min_seconds)[0]


def _list_demo(domain: str, max_seconds: float, min_seconds: float) -> tuple[list[Recording], list[PassedOver]]:
    """Return the demo corpus of one domain, and its recordings that are too short."""
    recordings, short = [], []
    for recording in _prompts() if domain == "speech" else _sounds():
        seconds = _seconds(recording)
        if seconds is not None and seconds < min_seconds:
            short.append(PassedOver(recording.source, "short recording", f"{seconds:.2f} s are below {min_seconds} s"))
        elif domain == "speech":
            recordings.append(recording)
        else:
            recordings += _parts(recording, seconds, max_seconds, min_seconds)
    return recordings, short


def read_manifest() -> dict[str, dict[str, str]]:
    """Return {package: {name of a recording: first digits of its SHA-256}}."""
    packages: dict[str, dict[str, str]] = {}
    for line in MANIFEST.read_text().splitlines():
        if line.startswith("["):
            names = packages.setdefault(line.strip("[]"), {})
        elif not line.startswith("#"):
            digits, name = line.split(" ")
            names[name] = digits
    return packages


def _find_recordings(package: DemoPackage, root: Path) -> dict[str, Path | None]:
    """Return {name: file} of a package's recordings, None for missing ones. root: the folder of the fetched version."""
    wanted = read_manifest()[package.name]
    files: dict[str, Path] = {}
    for path in sorted(root.rglob(f"*{package.suffix}")):
        files.setdefault(file_sha256(path)[:_DIGITS], path)
    found = {name: files.get(digits) for name, digits in wanted.items()}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        line = f"{root.name} lacks {len(missing)} of {len(wanted)} recordings: {', '.join(missing[:5])}{more}"
        if too_many_bad(len(missing), len(wanted)):
            raise UserError(
                f"{line}; put the .deb of Debian 12, from packages.debian.org/bookworm/{package.name}, into "
                f"{cache_dir() / 'downloads'}"
            )
        print(line)
    return found


def _prompts() -> list[Recording]:
    texts = _prompt_texts(fetch_apt(PROMPT_TEXTS.name))
    return [
        PROMPTS.recording("speech", name, file, text=texts.get(name, ""))
        for name, file in _find_recordings(PROMPTS, fetch_apt(PROMPTS.name)).items()
    ]


def _sounds() -> list[Recording]:
    sounds = [
        SAMPLES.recording("audio", name, file, labels=_sample_labels(name))
        for name, file in _find_recordings(SAMPLES, fetch_apt(SAMPLES.name)).items()
    ]
    return sounds + [
        GAME_SOUNDS.recording("audio", name, file, labels=(_words_of(name),))
        for name, file in _find_recordings(GAME_SOUNDS, fetch_apt(GAME_SOUNDS.name)).items()
    ]


def _seconds(recording: Recording) -> float | None:
    """Return the length of a recording, None if it is missing."""
    import soundfile

    if recording.problem:
        return None
    if recording.path.endswith(PROMPTS.suffix):
        return Path(recording.path).stat().st_size / _G722_BYTES_PER_SECOND
    return soundfile.info(recording.path).duration


def _prompt_texts(root: Path) -> dict[str, str]:
    """Return {file name without suffix: spoken text} from lines `name: text`; lines that begin with ; are comments."""
    texts = {}
    path = root / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines():
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            texts[name.strip()] = " ".join(text.split())
    return texts


def _sample_labels(name: str) -> tuple[str, ...]:
    """Return the labels of a sample: bd_haus -> bass drum, haus."""
    kind, _, rest = name.partition("_")
    return _SAMPLE_KINDS.get(kind, kind), rest.replace("_", " ")


def _words_of(name: str) -> str:
    """Return the words of a game sound's name: FireStation3 -> fire station."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", name)).lower()


def _parts(recording: Recording, seconds: float | None, max_seconds: float, min_seconds: float) -> list[Recording]:
    """Return consecutive clips of at most max_seconds, numbered from 1; the recording itself if there is only one."""
    count = 1 if seconds is None else 1 + max(0, math.floor((seconds - min_seconds) / max_seconds))
    if count == 1:
        return [recording]
    return [
        replace(recording, name=f"{recording.name}-part{n + 1}", start=round(n * max_seconds, 6), group=recording.name)
        for n in range(count)
    ]
