"""Damage recordings and tars at random and prepare them: a damaged file is read or left out with a reason, and nothing
else happens.

python -m tests.drills.hostile_data [--files 2000] [--seed 0] [--first 0] [--record]

File n depends on the seed and n alone, so that --first n --files 1 makes it again. A worker process lists, decodes and
takes the mel of one file after the other. Exits with 1 when a file ends it, raises anything but UserError, takes longer
than 10 s, makes its memory grow by more than 1 GiB, or makes a library print.
"""

import argparse
import io
import json
import random
import re
import resource
import select
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..ranks import ROOT
from .results import record

SECONDS = 10.0  # that one file may take
MEMORY = 1024  # MiB by which one worker may grow
STARTING = 120.0  # seconds until a worker answers
FORMATS = ("wav", "flac", "mp3", "ogg", "opus", "aiff", "m4a", "aac", "webm", "wma", "tar")
_KINDS = ("bit", "byte", "field", "field", "cut", "remove", "repeat", "zeros", "noise", "other")
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def whole_files() -> dict[str, list[bytes]]:
    """Return whole recordings of every format, and tars of them."""
    import soundfile

    from ..data.test_decoders import write_pyav
    from ..data.test_prepare import tone

    kinds = {"wav": ("PCM_16", "FLOAT", "IMA_ADPCM", "ULAW"), "flac": ("PCM_16", "PCM_24"), "mp3": (None,)}
    kinds |= {"ogg": ("VORBIS",), "opus": ("OPUS",), "aiff": ("PCM_16",)}
    files: dict[str, list[bytes]] = {}
    for form, subtypes in kinds.items():
        for number, subtype in enumerate(subtypes):
            content = io.BytesIO()
            wave = tone(1.0, 16000, number)
            stereo = np.stack([wave, wave / 2], axis=1)
            name = "OGG" if form == "opus" else form.upper()
            soundfile.write(content, stereo if number % 2 else wave, 16000, format=name, subtype=subtype)
            files.setdefault(form, []).append(content.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        encoders = {"m4a": ("aac", "ipod"), "aac": ("aac", "adts"), "webm": ("libopus", None), "wma": ("wmav2", "asf")}
        for form, (codec, container) in encoders.items():
            path = write_pyav(Path(folder, f"a.{form}"), codec, tone(1.0, 16000, 0), 16000, container)
            files[form] = [path.read_bytes()]
    files["tar"] = [tar_of(files, form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    return files


def tar_of(files: dict[str, list[bytes]], form: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for number, suffix in enumerate(("wav", "flac", "json", "mp3", "txt")):
            data = files[suffix][0] if suffix in files else json.dumps({"text": "hello"}).encode()
            folder = "" if form == tarfile.USTAR_FORMAT else "long/" * 30
            member = tarfile.TarInfo(f"{folder}take.{number // 2}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def damaged_file(files: dict[str, list[bytes]], seed: int, number: int) -> tuple[str, bytes]:
    """Return format and content of a file: one to four faults in a whole one, most of them in a header."""
    draw = random.Random(f"{seed} {number}")
    form = FORMATS[number % len(FORMATS)]
    content = bytearray(draw.choice(files[form]))
    for _ in range(draw.randint(1, 4)):
        _damage(content, draw, files)
    if draw.random() < 0.7:
        _mend(content, form)
    return form, bytes(content)


def _damage(content: bytearray, draw: random.Random, files: dict[str, list[bytes]]) -> None:
    headers = [place for place in range(0, len(content), 512) if content[place + 257 : place + 262] == b"ustar"]
    start = draw.choice(headers) if headers else 0
    end = min(len(content), start + draw.choice((16, 64, 512))) if draw.random() < 0.7 else len(content)
    place = draw.randrange(start, max(start + 1, end))
    length = draw.choice((1, 2, 4, 8, 100, 1000))
    kind = draw.choice(_KINDS)
    if kind == "bit":
        content[place : place + 1] = bytes(b ^ (1 << draw.randrange(8)) for b in content[place : place + 1])
    elif kind == "byte":
        content[place : place + 1] = bytes([draw.randrange(256)])
    elif kind == "field":
        packed = struct.pack(draw.choice("<>") + "I", draw.choice((*_EXTREMES, draw.randrange(2**32))))
        content[place : place + 4] = packed
    elif kind == "cut":
        del content[place:]
    elif kind == "remove":
        del content[place : place + length]
    elif kind == "repeat":
        content[place:place] = content[place : place + length] * draw.choice((1, 2, 50))
    elif kind == "zeros":
        content[place : place + length] = bytes(length)
    elif kind == "noise":
        content[place : place + length] = draw.randbytes(length)
    elif kind == "other":
        other = draw.choice(files[draw.choice(FORMATS)])
        content[place : place + length] = other[:length]


def _mend(content: bytearray, form: str) -> None:
    """Write right checksums over damaged headers, which then count as whole."""
    if form == "tar":
        for start in range(0, len(content) - 511, 512):
            if content[start + 257 : start + 262] == b"ustar":
                content[start + 148 : start + 156] = b" " * 8
                content[start + 148 : start + 156] = b"%06o\0 " % (sum(content[start : start + 512]) % 2**18)
    elif form in ("ogg", "opus"):
        pages = [match.start() for match in re.finditer(b"OggS", content)]
        for start, end in pairwise([*pages, len(content)]):
            content[start + 22 : start + 26] = bytes(4)
            content[start + 22 : start + 26] = struct.pack("<I", _ogg_checksum(content[start:end]))


def _ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value = (value << 8) & 0xFFFFFFFF ^ _CRC[value >> 24 ^ byte]
    return value


def _crc_entry(value: int) -> int:
    for _ in range(8):
        value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
    return value & 0xFFFFFFFF


_CRC = [_crc_entry(byte << 24) for byte in range(256)]


# The worker


def work(folder: Path, seed: int, first: int, last: int) -> None:
    """Prepare the files one after the other; print a line of JSON before and after each."""
    from agrepa_fast.audio.mel import LogMel
    from agrepa_fast.config_file import load_config

    data = load_config("demo").data
    log_mel, files = LogMel(data), whole_files()
    for number in range(first, last):
        form, content = damaged_file(files, seed, number)
        path = folder / f"take.{form}"
        path.write_bytes(content)
        _say(number=number, form=form, bytes=len(content))
        try:
            outcome = ", ".join(sorted(set(_prepare(path, data, log_mel))))
        except Exception:
            outcome = f"fault: {traceback.format_exc()}"
        _say(number=number, outcome=outcome, memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        path.unlink()


def _prepare(path: Path, data, log_mel) -> list[str]:
    """Return the kinds of what becomes of a file's recordings."""
    from agrepa_fast.corpora.folder import folder_source
    from agrepa_fast.corpora.webdataset import webdataset_source
    from agrepa_fast.errors import UserError
    from agrepa_fast.prepare.decode import _features

    try:
        tar = path.suffix == ".tar"
        source = webdataset_source(str(path), "audio") if tar else folder_source(path.parent, "audio")
    except UserError:
        return ["refused tar"]
    made = [_features(recording, data, {16000}, log_mel) for recording in source.recordings()]
    return [one["kind"] or "read" for one in made]


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


# The watcher


@dataclass
class HostileData:
    """The files from `first` to before `last`, prepared by workers, and what became of them."""

    seed: int
    first: int
    last: int
    outcomes: Counter = field(default_factory=Counter)  # (format, what became of a file)
    faults: list[str] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)  # seconds, file
    memory: float = 0.0  # MiB by which a worker grew

    def run(self) -> "HostileData":
        """Prepare all files, in a new worker after one that ended."""
        number = self.first
        while number < self.last:
            number = self._run_worker(number)
        return self

    def _run_worker(self, number: int) -> int:
        """Prepare files until the worker ends. Returns the number of the first one that is left."""
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("a+b") as errors:
            command = [sys.executable, "-m", "tests.drills.hostile_data", "--work", folder]
            command += ["--seed", str(self.seed), "--first", str(number), "--files", str(self.last - number)]
            worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, bufsize=0)
            try:
                return self._watch(worker, number, errors)
            finally:
                worker.kill()
                worker.wait()
                worker.stdout.close()

    def _watch(self, worker: subprocess.Popen, number: int, errors: BinaryIO) -> int:
        form, began, memory, printed = "", None, None, 0
        while number < self.last:
            line = _line(worker, STARTING if began is None else SECONDS)
            if line is None:
                self._fault(number, form, f"took more than {SECONDS} s")
            elif not line:
                words = _read_from(errors, printed)[-300:]
                self._fault(number, form, f"ended the worker with code {worker.wait()}: {words!r}")
            if not line:
                return number + 1
            said = json.loads(line)
            if "form" in said:
                printed = printed if began else len(_read_from(errors, 0))  # what imports print is of no file
                form, began = said["form"], time.monotonic()
                continue
            self.slowest = max(self.slowest, (time.monotonic() - began, number))
            memory = said["memory"] if memory is None else memory
            self.memory = max(self.memory, said["memory"] - memory)
            kind, _, details = said["outcome"].partition(": ")
            self.outcomes[form, kind] += 1
            if details:
                self._fault(number, form, f"raised {details}")
            if said["memory"] - memory > MEMORY:
                self._fault(number, form, f"made memory grow by {said['memory'] - memory:.0f} MiB")
                memory = said["memory"]
            if text := _read_from(errors, printed):
                self._fault(number, form, f"made a library print {text[:200]!r}")
                printed += len(text)
            number += 1
        return number

    def _fault(self, number: int, form: str, fault: str) -> None:
        self.faults.append(f"file {number} ({form}) {fault}")

    def summary(self) -> list[str]:
        """Return the lines to record."""
        count = sum(self.outcomes.values())
        seconds, slowest = self.slowest
        lines = [
            f"{count} files, seed {self.seed}: {len(self.faults)} faults; the slowest file, {slowest}, took "
            f"{seconds:.2f} s, memory grew by {self.memory:.0f} MiB\n"
        ]
        for form in FORMATS:
            of_form = {kind: times for (name, kind), times in sorted(self.outcomes.items()) if name == form}
            lines.append(f"- {form}: {', '.join(f'{times} {kind}' for kind, times in of_form.items())}")
        return lines


def _line(worker: subprocess.Popen, seconds: float) -> bytes | None:
    """Return the worker's next line, nothing if it has ended, None if it says nothing for so long."""
    ready, _, _ = select.select([worker.stdout], [], [], seconds)
    return worker.stdout.readline() if ready else None


def _read_from(stream: BinaryIO, place: int) -> bytes:
    stream.seek(place)
    return stream.read()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the summary into results.md")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.seed, args.first, args.first + args.files)
        return 0
    drill = HostileData(args.seed, args.first, args.first + args.files).run()
    print("\n".join([*drill.faults, *drill.summary()]))
    if args.record:
        record("Hostile data", f"python -m tests.drills.hostile_data --files {args.files}", drill.summary())
    return bool(drill.faults)


if __name__ == "__main__":
    sys.exit(main())
