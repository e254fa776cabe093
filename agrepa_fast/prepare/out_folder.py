"""The folder that preparation writes into: its lock, its index so far, and its finished index."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..config import DOMAINS, DataConfig
from ..corpora.recordings import Source
from ..data.index import INDEX, SCHEMA, Index, attention_layers, load_index, write_index
from ..data.matching import known_features
from ..data_config import ShardConfig, values_of
from ..errors import UserError
from ..files import FolderLock
from ..ranks import Ranks
from .job import WORK, remove_folders, write_report
from .roles import check_extra_tokens, check_tokens
from .speaker_pass import check_speaker


@contextmanager
def locked(out: Path, ranks: Ranks) -> Iterator[None]:
    """Make <out>/.work and lock it, on rank 0 for all. Raises UserError if another preparation writes there."""
    with FolderLock(out / WORK, "choose another --out") if ranks.rank == 0 else nullcontext():
        yield


def read_existing(
    data: DataConfig, out: Path, sources: list[Source], *, targets: bool = True, but: Sequence[str] = ()
) -> dict:
    """Return the content of the index in `out`, or of an empty one. Raises UserError if it was made with other settings
    (`but` these) or recordings, or, with `targets`, with other teachers or tokenizers."""
    settings = values_of(ShardConfig, data)
    if not (out / INDEX).is_file():
        return {"schema": SCHEMA, "features": settings, "domains": {}, "shards": []}
    content = load_index(out, verify=False).content
    features = known_features(out, content["features"])
    if data.speaker is None and any(_has_added_vectors(domain) for domain in content["domains"].values()):
        features["speaker"] = None  # as the shards were prepared, before --add-speaker
    for name in settings.keys() - set(but):
        check_setting(out, name, features.get(name), settings[name])
    check_extra_tokens(out, data, content["domains"])
    check_speaker(out, data, content["domains"])
    for source in sources:
        if domain := content["domains"].get(source.domain):
            if targets:
                _check_targets(out, data, domain, source.domain)
            _check_recordings(out, domain["recordings"], source)
    return content


def _has_added_vectors(domain: dict) -> bool:
    return "speaker" in domain and domain["speaker"]["files"] is not None


def _check_targets(out: Path, data: DataConfig, domain: dict, name: str) -> None:
    first, setting = next(iter(domain["teachers"].values())), f"{name}_teacher"
    check_setting(out, setting, first["spec"], getattr(data, setting))
    check_setting(out, "teacher_rate", first["rate"], data.teacher_rate)
    check_setting(out, "teacher_attention", attention_layers(first), data.teacher_attention)
    check_setting(out, "teacher_precision", first["identity"].get("precision"), data.teacher_precision)
    check_tokens(out, data, domain, f"{name}_tokens")


def _check_recordings(out: Path, prepared: dict, source: Source) -> None:
    if prepared["identity"] != source.identity:
        difference = "changed since" if prepared["name"] == source.name else f"are not {source.name}'s"
        raise UserError(
            f"{out} holds {source.domain} recordings of {prepared['name']}, which {difference}: "
            f"choose another --out, or remove {out}"
        )


def check_setting(out: Path, name: str, prepared: object, wanted: object) -> None:
    """Raise UserError unless a setting of data is the one that `out` was prepared with."""
    if prepared != wanted:
        raise UserError(
            f"{out} was prepared with data.{name}={prepared}, not {wanted}: choose another --out, or remove {out}"
        )


def finish(out: Path, content: dict, throughput: dict[str, dict], kinds: str) -> Index:
    """Write index.json, after all files that it names. Then remove the work folders of the domains in `throughput`
    whose kind matches the pattern `kinds`; another domain's may still be needed."""
    content["domains"] = {d: content["domains"][d] for d in DOMAINS if d in content["domains"]}
    if content["features"].get("speaker") and any("speaker" not in domain for domain in content["domains"].values()):
        content["features"]["speaker"] = None
        print(f"{out}: a domain has no speaker vectors, so runs take none: add them by --add-speaker")
    # Stable: a domain's shards of a split stay in the order in which they were planned.
    content["shards"].sort(key=lambda shard: (DOMAINS.index(shard["domain"]), shard["split"]))
    write_report(out, throughput)
    write_index(out, content)
    work = out / WORK
    remove_folders(folder for domain in throughput for folder in work.glob(f"{domain}-{kinds}"))
    if not any(path.is_dir() for path in work.iterdir()):
        remove_folders([work])
    return load_index(out, verify=False)
