"""The loader: training clips per second out of shards, with 0, 1 and 2 loader processes, from a folder and from a local
http server, beside decoding FLAC, resampling and mels on the fly; the wait for the first batch; and how often an epoch
reads each shard.

python benchmarks/loader.py [--clips 1536] [--seconds 5] [--out FILE]

There are more shards than a process keeps open, so that all are read again and again. The clips are noise of the size
that training has, written for this: 10 s at 24 kHz, 100 mels, 500 tokens, a 1280-d teacher. The folder is in the page
cache; the numbers say nothing about a disk.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from _results import print_table, write_json
from _timing import spread
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from agrepa_fast.audio.mel import LogMel
from agrepa_fast.audio.waves import decode, resample
from agrepa_fast.config import DOMAINS, DataConfig
from agrepa_fast.data.batch import collate
from agrepa_fast.data.index import SCHEMA, Index, load_index, write_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.data.plan import BatchPlan
from agrepa_fast.data.reading import OpenShard
from agrepa_fast.data.samples import Sample
from agrepa_fast.data.tars import split_clips
from agrepa_fast.data.writing import write_shard
from agrepa_fast.data_config import ShardConfig
from agrepa_fast.settings import setting_names

DATA = DataConfig()  # 24 kHz, 100 mels, hop 256
FRAMES, TOKENS, TEACHER, BATCH = 938, 500, 1280, 16


def write_corpus(folder: Path, clips: int, shard_clips: int) -> Index:
    """Two domains of `clips` training clips each."""
    draw = np.random.default_rng(0)
    settings = asdict(DATA)
    features = {name: settings[name] for name in setting_names(ShardConfig)}
    content = {"schema": SCHEMA, "features": features, "domains": {}, "shards": []}
    for number, domain in enumerate(DOMAINS):
        first = number * DATA.codebook

        def sample(place: int, domain: str = domain, first: int = first) -> Sample:
            return Sample(
                key=f"{domain}-{place:06d}",
                domain=domain,
                text="what was said, " * 8,
                labels=(),
                frames=FRAMES,
                seconds=10.0,
                cut=False,
                source="noise",
                licence="none",
                mel=(draw.normal(size=(FRAMES, DATA.n_mels)) * 2 - 5).astype(np.float16),
                tokens=draw.integers(first, first + DATA.codebook, TOKENS).astype(np.int32),
                teacher=draw.normal(size=TEACHER).astype(np.float16),
            )

        for start in range(0, clips, shard_clips):
            path = folder / f"train-{domain}-{start // shard_clips:04d}.tar"
            entry = write_shard(path, map(sample, range(start, min(clips, start + shard_clips))), "teacher")
            content["shards"].append(entry | {"split": "train", "domain": domain, "bucket": FRAMES})
        book = folder / f"codebook-{domain}.bin"
        book.write_bytes(b"")  # no model is made here
        content["domains"][domain] = {
            "mel": {"frames": 2, "sum": -10.0 * DATA.n_mels, "sum_squares": 58.0 * DATA.n_mels},
            "tokens": {
                "offset": first,
                "vocab": DATA.codebook,
                "file": book.name,
                "bytes": 0,
                "sha256": hashlib.sha256(b"").hexdigest(),
            },
            "teachers": {
                "teacher": {
                    "spec": DATA.speech_teacher,
                    "dim": TEACHER,
                    "rate": None,
                    "identity": {},
                    "mean": [0.0] * TEACHER,
                    "files": None,
                }
            },
        }
    write_index(folder, content)
    return load_index(folder)


def rate(batches: Iterator, seconds: float, clips_of: Callable[[object], int]) -> dict[str, float]:
    """Return clips/s over `seconds` after the first batches, in five parts for the spread, and the CPU time per clip of
    this process with its threads, which other programs on the machine change little."""
    for _ in range(6):
        next(batches)
    parts, total, cpu = [], 0, time.process_time()
    for _ in range(5):
        clips, start = 0, time.perf_counter()
        while (took := time.perf_counter() - start) < seconds / 5:
            clips += clips_of(next(batches))
        parts.append(clips / took)
        total += clips
    cpu, spreads = time.process_time() - cpu, spread(parts)
    percentiles = {"clips_per_s": spreads["median_s"], "p20": spreads["p20_s"], "p80": spreads["p80_s"]}
    return percentiles | {"cpu_ms": 1e3 * cpu / total}


def cached(index: Index, workers: int, seconds: float) -> dict[str, float]:
    layout = BatchLayout(BATCH, 1, 0, 1)
    start = time.perf_counter()
    batches = TrainBatches(index, DataConfig(workers=workers), layout, seed=0, center=True)
    next(batches)
    first = time.perf_counter() - start
    measured = rate(batches, seconds, lambda batch: len(batch.keys))
    batches.close()
    return measured | {"first_batch_s": first}


class OnTheFly(IterableDataset):
    """Mels of FLAC files, decoded, resampled and computed for every clip."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __iter__(self) -> Iterator[torch.Tensor]:
        torch.set_num_threads(1)
        log_mel, worker = LogMel(DATA), get_worker_info()
        number = worker.id if worker else 0
        while True:
            file = self.files[number % len(self.files)]
            wave, at = decode(file, file.name, 0.0, 10.01)
            yield torch.from_numpy(log_mel(resample(wave, at, DATA.sample_rate)[: 10 * DATA.sample_rate]))
            number += 1


def on_the_fly(folder: Path, workers: int, seconds: float) -> dict[str, float]:
    import soundfile

    files = [folder / f"{number}.flac" for number in range(16)]
    for number, file in enumerate(files):
        if not file.is_file():
            noise = np.random.default_rng(number).normal(size=10 * 16000)
            wave = np.convolve(noise, np.hanning(64) / 32, "same") * 0.05  # no more treble than speech has
            soundfile.write(file, wave.astype(np.float32), 16000, subtype="PCM_16")
    return rate(iter(DataLoader(OnTheFly(files), batch_size=None, num_workers=workers)), seconds, lambda _: 1)


def serve(folder: Path) -> tuple[subprocess.Popen, str]:
    """Start an http server in a process of its own; return it and its URL."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    port = re.search(r"port (\d+)", server.stdout.readline())[1]
    return server, f"http://127.0.0.1:{port}"


def stages(index: Index) -> dict[str, float]:
    """Return the milliseconds per clip of each stage, in one process."""
    shard = index.shards("train", "speech")[0]
    content = shard.path.read_bytes()
    opened = OpenShard(shard, index)
    samples = [opened[number % shard.clips] for number in range(BATCH)]

    def timed(call: Callable[[], object], clips: int) -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start) / clips)
        return sorted(times)[4]

    return {
        "read": timed(shard.path.read_bytes, shard.clips),
        "sha256": timed(lambda: hashlib.sha256(content).digest(), shard.clips),
        "split the tar": timed(lambda: split_clips(content), shard.clips),
        "check a clip": timed(lambda: [opened[number] for number in range(shard.clips)], shard.clips),
        "collate": timed(lambda: collate(samples, tuple(range(BATCH)), index), BATCH),
    }


def reads_per_shard(index: Index, world: int, workers: int) -> float:
    """Return how often an epoch reads each shard, over all ranks and their loader processes, from the plan."""
    plan = BatchPlan(index, 0.5, 0, clips=BATCH * world)
    reads = 0
    steps = index.clips("train", "speech") * 2 // (BATCH * world)
    for rank in range(world):
        layout = BatchLayout(BATCH * world, 1, rank, world)
        for worker in range(workers):
            kept: OrderedDict = OrderedDict()
            for step in range(worker, steps, workers):
                number, picks = plan.batch(step)
                for place in layout.places(0):
                    domain, position = picks[place]
                    shard = domain, plan.orders[number, domain].find(position).shard
                    reads += shard not in kept
                    kept[shard] = None
                    kept.move_to_end(shard)
                while len(kept) > 2 * (BATCH + 2):
                    kept.popitem(last=False)
    return reads / sum(len(index.shards("train", domain)) for domain in DOMAINS)


def many_shards(shards: int) -> Index:
    """Return the index of a larger corpus, without its files."""
    entry = {"split": "train", "clips": 64, "frames": 64 * FRAMES, "bucket": FRAMES, "bytes": 0, "sha256": ""}
    entries = [entry | {"file": f"{d}{n}", "domain": d} for d in DOMAINS for n in range(shards // 2)]
    return Index(Path(), {"domains": dict.fromkeys(DOMAINS), "shards": entries})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1536, help="of each domain; 0.2 MB each")
    parser.add_argument("--shard-clips", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", help="JSON file (default: benchmarks/results/loader_<device>.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    results: dict[str, dict] = {"cached, folder": {}, "cached, http": {}, "on the fly": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        index = write_corpus(folder, args.clips, args.shard_clips)
        server, url = serve(folder)
        remote = load_index(url)
        for workers in args.workers:
            results["cached, folder"][workers] = cached(index, workers, args.seconds)
            results["cached, http"][workers] = cached(remote, workers, args.seconds)
            results["on the fly"][workers] = on_the_fly(folder, workers, args.seconds)
        server.terminate()
        milliseconds = stages(index)
    rows = [
        (
            source,
            workers,
            f"{r['clips_per_s']:.0f}",
            f"{r['p20']:.0f} to {r['p80']:.0f}",
            f"{r['cpu_ms']:.2f}",
            f"{r['first_batch_s']:.2f}" if "first_batch_s" in r else "",
        )
        for source, of_workers in results.items()
        for workers, r in of_workers.items()
    ]
    columns = ("from", "processes", "clips/s", "p20 to p80", "own CPU ms per clip", "first batch s")
    print_table("training clips of 10 s", columns, rows)
    print_table("one process", ("stage", "ms per clip"), [(name, f"{ms:.3f}") for name, ms in milliseconds.items()])
    large = many_shards(2048)
    reads = {
        f"{world} ranks x {workers}": reads_per_shard(large, world, workers)
        for world, workers in ((1, 1), (1, 2), (2, 1), (4, 1), (8, 1), (8, 2))
    }
    rows = [(name, f"{times:.2f}") for name, times in reads.items()]
    print_table("reads of a shard in an epoch, 2048 shards of 64 clips", ("loader processes", "reads"), rows)
    settings = {"clips": args.clips, "shard_clips": args.shard_clips, "seconds": args.seconds, "batch": BATCH}
    found = {"load_average_at_start": load, "results": results, "milliseconds": milliseconds, "reads": reads}
    print("wrote", write_json("loader", {"settings": settings, **found}, args.out))


if __name__ == "__main__":
    main()
