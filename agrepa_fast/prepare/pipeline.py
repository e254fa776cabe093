"""`agrepa prepare`: recordings -> log-mel, tokens and teacher targets -> WebDataset shards with index.json.

Stages per domain: decode (once per recording: cut to data.max_seconds, resample, mel), teacher, tokens, shards. Every
rank does its part of each. The result of each clip waits in a file below <out>/.work, so that a preparation that was
interrupted goes on where it stopped, on any number of ranks, and ends with the same bytes. index.json is written last,
and .work is removed after it.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from ..config import Config, DataConfig
from ..corpora.demo import demo_sources
from ..corpora.folder import folder_source
from ..corpora.recordings import PassedOver, Recording, Source
from ..data.index import Index, load_index
from ..ranks import ALONE, Ranks
from .decode import decode_recordings
from .job import Job, digest
from .out_folder import finish, locked, read_existing
from .roles import domain_roles
from .skipped import BAD, UNALIGNED, LeftOut, check_share, count_line, print_left_out, write_skipped
from .speaker_pass import load_speaker, run_speaker_pass
from .split import only_group, split_clips
from .targets import attention_shape
from .teacher_pass import TeacherPass
from .token_pass import run_token_pass
from .write import ShardStage


def prepare_demo(config: Config, out: Path, ranks: Ranks = ALONE) -> Index:
    """Fetch the demo corpus and write it as shards into `out`; see prepare."""
    return prepare(config, lambda: demo_sources(config.data), out, ranks)


def prepare_folder(config: Config, path: Path, domain: str, out: Path, ranks: Ranks = ALONE) -> Index:
    """Write the recordings below `path` as shards of `domain` into `out`; see prepare."""
    return prepare(config, lambda: [folder_source(Path(path), domain)], out, ranks)


def prepare(config: Config, list_sources: Callable[[], list[Source]], out: Path, ranks: Ranks = ALONE) -> Index:
    """Write the recordings of the sources as shards into `out`, beside those of the other domain if there are any.
    Every rank must call it; rank 0 alone calls `list_sources`, so that all work on the same list.

    Does nothing if `out` holds them already. Raises UserError, in one line with the remedy, for too many bad
    recordings, too few for the codebook, and an `out` of other settings or other recordings.
    """
    data, out = config.data, Path(out)
    sources = list_sources() if ranks.rank == 0 else []
    content = ranks.from_rank_0(lambda: read_existing(data, out, sources))
    domains = ranks.from_rank_0(lambda: [source.domain for source in sources])
    if content["domains"].keys() >= set(domains):
        if ranks.rank == 0:
            print(f"{out}: prepared before with the same settings, nothing to do")
            load_index(out, verify=False)
        return Index(out, content)
    with locked(out, ranks), reading_threads() as pool:
        content = ranks.from_rank_0(lambda: read_existing(data, out, sources))  # another process may have finished
        load_teacher = cache(lambda spec: load_teacher_on_every_rank(data, spec, ranks))
        throughput = {}
        for number, domain in enumerate(domains):
            if domain in content["domains"]:
                continue
            job = Job(data, out, domain, ranks, pool)
            recordings = ranks.from_rank_0(lambda number=number: sources[number].recordings())
            source = sources[number] if ranks.rank == 0 else None
            entry, shards = _prepare_domain(job, recordings, source, load_teacher)
            if source is not None:
                entry["recordings"] |= {"name": source.name, "identity": source.identity}
                content["domains"][domain] = entry
                content["shards"] += shards
                throughput[domain] = job.throughput
        return ranks.from_rank_0(lambda: finish(out, content, throughput, "*"))


def _prepare_domain(
    job: Job, recordings: list[Recording], source: Source | None, load_teacher: Callable[[str], Any]
) -> tuple[dict, list[dict]]:
    """Run all stages of one domain. `source`: that of the recordings, on rank 0. Returns, on rank 0, the domain's entry
    in the index and those of its shards."""
    teacher = load_teacher(getattr(job.data, f"{job.domain}_teacher"))
    attention_shape(teacher, job.data)  # refuses a teacher without one before any recording is read
    roles, speaker = domain_roles(job, teacher, load_teacher), load_speaker(job)
    rates = {teacher.sample_rate, *(role.sample_rate for role in roles)}
    if speaker is not None:
        rates.add(speaker.sample_rate)
    clips, left_out = decode_recordings(job, recordings, rates)
    counts = _account(job, recordings, left_out, source)
    splits = split_clips(clips, job.data.val_share)
    with_teacher = {role.name: role.tokenizer for role in roles if role.teacher is teacher}
    targets = TeacherPass(job, teacher, splits, with_teacher)
    codebook = targets.run()
    passes = {role.name: run_token_pass(job, role, splits) for role in roles if role.teacher is not teacher}
    if speaker is not None:
        passes["speaker"] = run_speaker_pass(job, speaker, splits)
    aligned = {role.name for role in roles if role.spec == "phones"}
    unusable = {name: one.gather_unusable(job.ranks) for name, one in {"teacher": targets, **passes}.items()}
    late = {
        name: LeftOut(UNALIGNED if stage in aligned else BAD, reason)
        for stage, part in unusable.items()
        for name, reason in part.items()
    }
    if late:
        left_out |= late
        counts = _account(job, recordings, left_out, source)
        clips = [clip for clip in clips if clip.name not in late]
        splits = split_clips(clips, job.data.val_share)
    descriptions = digest([(r.name, r.text, r.labels, r.source, r.licence) for r in recordings])
    entry, shards = ShardStage(job, descriptions, splits, targets, codebook, roles, passes).run()
    if speaker is not None and source is not None:
        entry["speaker"] = {"dim": speaker.dim, "identity": speaker.identity, "files": None}
    job.print(counts)
    if group := only_group(clips):
        job.print(f"{job.domain}: all clips are of one speaker or video, {group}, which training and validation share")
    skipped = [
        {"name": r.name, "source": r.source, "reason": left_out[r.name].reason}
        for r in recordings
        if r.name in left_out
    ]
    return {**entry, "recordings": {}, "skipped": skipped}, shards


def _account(job: Job, recordings: list[Recording], left_out: dict[str, LeftOut], source: Source | None) -> str:
    """List the files that were not taken in skipped.csv, and print the recordings among them. Returns the line that
    counts them, on rank 0. Raises UserError if they are too many. Every rank must call it."""
    counts = [""]

    def account() -> None:
        named = [PassedOver(r.source, *left_out[r.name]) for r in recordings if r.name in left_out]
        entries = [*named, *source.passed_over()]
        write_skipped(job.out, job.domain, source.name, entries)
        check_share(job.out, job.domain, named, len(recordings))
        print_left_out(job.out, job.domain, named)
        counts[0] = count_line(job.out, job.domain, source.name, entries, len(recordings) - len(named))

    job.ranks.on_rank_0(account)
    return counts[0]


def reading_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1))


def load_teacher_on_every_rank(data: DataConfig, spec: str, ranks: Ranks):
    """Return the teacher on this rank's device. Raises UserError unless all ranks have the same weights."""
    from ..teachers import load_teacher

    return ranks.load_on_every_rank(
        f"teacher {spec!r}", lambda device: load_teacher(spec, device, data.teacher_precision)
    )
