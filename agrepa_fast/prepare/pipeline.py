"""`agrepa prepare`: recordings -> log-mel, tokens and teacher targets -> WebDataset shards with index.json.

Stages per domain: decode (cut once to data.max_seconds, resample, mel), teacher, tokens, shards. Every rank does its
part of each (ranks.py). Results of each clip wait in <out>/.work, written atomically, so an interrupted run goes on
where it stopped, on any number of ranks, and ends with the same bytes. index.json is written last, and .work removed
after it.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

from ..config import DOMAINS, Config, DataConfig, ShardConfig, values_of
from ..corpora.demo import demo_sources
from ..corpora.folder import folder_source
from ..corpora.recordings import Recording, Source
from ..data.index import INDEX, SCHEMA, Index, load_index, write_index
from ..data.matching import known_features
from ..errors import UserError
from ..files import FolderLock
from ..ranks import ALONE, Ranks
from .decode import decode_stage, digest, name_hash, validation_groups
from .job import WORK, Job, remove, write_report
from .teacher_pass import TeacherStage
from .token_pass import TokenStage, check_extra, check_tokens, domain_roles
from .write import ShardStage


def prepare_demo(config: Config, out: Path, ranks: Ranks = ALONE) -> Index:
    """Fetch the demo corpus and write it as shards into `out`; see prepare."""
    return prepare(config, lambda: demo_sources(config.data), out, ranks)


def prepare_folder(config: Config, path: Path, domain: str, out: Path, ranks: Ranks = ALONE) -> Index:
    """Write the recordings below `path` as shards of `domain` into `out`; see prepare."""
    return prepare(config, lambda: [folder_source(Path(path), domain)], out, ranks)


def prepare(config: Config, listing: Callable[[], list[Source]], out: Path, ranks: Ranks = ALONE) -> Index:
    """Write the recordings of the sources that `listing` returns as shards into `out`, beside those of the other domain
    if any. Rank 0 alone calls it: one walk over a shared file system, and the same list for all.

    Does nothing when that has been done. Raises UserError, in one line with the remedy, for too many bad recordings,
    too few for the codebook, and an `out` of other settings or other recordings.
    """
    data, out = config.data, Path(out)
    sources = listing() if ranks.rank == 0 else []
    content = ranks.from_rank_0(lambda: existing(data, out, sources))
    domains = ranks.from_rank_0(lambda: [source.domain for source in sources])
    if content["domains"].keys() >= set(domains):
        if ranks.rank == 0:
            print(f"{out}: prepared before with the same settings, nothing to do")
            load_index(out, verify=False)
        return Index(out, content)
    with only_writer(out, ranks), workers() as pool:
        content = ranks.from_rank_0(lambda: existing(data, out, sources))  # another process may have finished meanwhile
        teacher_of = cache(lambda spec: load_on_all(data, spec, ranks))
        throughput = {}
        for number, domain in enumerate(domains):
            if domain in content["domains"]:
                continue
            job = Job(data, out, domain, ranks, pool)
            recordings = ranks.from_rank_0(lambda number=number: sources[number].recordings())
            entry, shards = _prepare_domain(job, recordings, teacher_of)
            if ranks.rank == 0:
                source = sources[number]
                entry["recordings"] |= {"name": source.name, "identity": source.identity}
                content["domains"][domain] = entry
                content["shards"] += shards
                throughput[domain] = job.throughput
        return ranks.from_rank_0(lambda: finish(out, content, throughput, "*"))


def finish(out: Path, content: dict, throughput: dict[str, dict], results: str) -> Index:
    """Write index.json, after everything that it names, and remove from the work folder the results (a pattern of their
    kind) of the domains that `throughput` is about; those of another domain may still be waiting for its rest."""
    content["domains"] = {d: content["domains"][d] for d in DOMAINS if d in content["domains"]}
    # Stable: a domain's shards of a split stay in the order in which they were planned.
    content["shards"].sort(key=lambda shard: (DOMAINS.index(shard["domain"]), shard["split"]))
    write_report(out, throughput)
    write_index(out, content)
    work = out / WORK
    remove(folder for domain in throughput for folder in work.glob(f"{domain}-{results}"))
    if not any(path.is_dir() for path in work.iterdir()):
        remove([work])
    return load_index(out, verify=False)


def existing(data: DataConfig, out: Path, sources: list[Source], teachers: bool = True) -> dict:
    """The content of out's index, or an empty one. UserError when its settings, its recordings or, with `teachers`, its
    teachers are others."""
    settings = values_of(ShardConfig, data)
    if not (out / INDEX).is_file():
        return {"schema": SCHEMA, "features": settings, "domains": {}, "shards": []}
    content = load_index(out, verify=False).content
    features = known_features(out, content["features"])
    for name, value in settings.items():
        same_setting(out, name, features.get(name), value)
    check_extra(out, data, content)
    for source in sources:
        there = content["domains"].get(source.domain)
        if there is None:
            continue
        if teachers:
            first = next(iter(there["teachers"].values()))
            name = f"{source.domain}_teacher"
            same_setting(out, name, first["spec"], getattr(data, name))
            same_setting(out, "teacher_rate", first["rate"], data.teacher_rate)
            same_setting(out, "teacher_precision", first["identity"].get("precision"), data.teacher_precision)
            check_tokens(out, data, content, source.domain)
        if there["recordings"]["identity"] != source.identity:
            changed = "changed since" if there["recordings"]["name"] == source.name else f"are not {source.name}'s"
            raise UserError(
                f"{out} holds {source.domain} recordings of {there['recordings']['name']}, which {changed}: "
                f"choose another --out, or remove {out}"
            )
    return content


def same_setting(out: Path, name: str, there: object, wanted: object) -> None:
    if there != wanted:
        raise UserError(
            f"{out} was prepared with data.{name}={there}, not {wanted}: choose another --out, or remove {out}"
        )


@contextmanager
def only_writer(out: Path, ranks: Ranks) -> Iterator[None]:
    """Make <out>/.work, and hold its lock, on rank 0 for all."""
    with FolderLock(out / WORK, "choose another --out") if ranks.rank == 0 else nullcontext():
        yield


def workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1))


def load_on_all(data: DataConfig, spec: str, ranks: Ranks):
    """The teacher on this rank's device, the same on all ranks."""
    from ..teachers import load_teacher

    return ranks.load_on_every_rank(
        f"teacher {spec!r}", lambda device: load_teacher(spec, device, data.teacher_precision)
    )


def _prepare_domain(job: Job, recordings: list[Recording], teacher_of: Callable) -> tuple[dict, list[dict]]:
    """All stages of one domain. Returns, on rank 0, its entry in the index, and its shards'."""
    data, domain = job.data, job.domain
    clips, skipped = decode_stage(job, recordings)
    held_out = validation_groups(clips, data.val_share)
    splits = {"train": [], "val": []}
    for clip in sorted(clips, key=lambda clip: name_hash("order", clip.recording.name)):
        splits["val" if clip.recording.split_group in held_out else "train"].append(clip)
    teacher = teacher_of(getattr(data, f"{domain}_teacher"))
    roles = domain_roles(job, teacher, teacher_of)
    # A tokenizer of this teacher's frames runs in the teacher's pass, any other in one of its own.
    stage = TeacherStage(job, teacher, splits, {r.name: r.tokenizer for r in roles if r.teacher is teacher})
    codebook = stage.run()
    passes = {role.name: TokenStage(job, role, splits) for role in roles if role.teacher is not teacher}
    for tokens in passes.values():
        tokens.run()
    described = digest([(r.name, r.text, r.labels, r.source, r.licence) for r in recordings])
    entry, shards = ShardStage(job, described, splits, stage, codebook, roles, passes).run()
    return {**entry, "recordings": {}, "skipped": skipped}, shards
