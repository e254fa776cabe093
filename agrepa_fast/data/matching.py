"""Check that shards were made with the settings of a run."""

from dataclasses import replace

from tqdm import tqdm

from ..config import DataConfig
from ..config_file import without_removed
from ..data_config import ShardConfig
from ..domains import DOMAINS
from ..errors import UserError
from ..settings import setting_names
from .index import INDEX, Index, attention_layers, load_index
from .locations import Location, Remote, locate
from .tars import read_descriptions
from .text import TextIds, load_text
from .transcribed import transcribed

_NEW = ("long", "speaker")  # features that shards of version 0.1 do not say


def matching_index(data: DataConfig) -> Index:
    """Return the index of data.path, with the teachers that `data` names.

    Sizes of local files are checked, remote files are not. Raises UserError, besides those of load_index, for features
    that were made with other settings than `data`'s, and for a teacher that the shards do not have.
    """
    index = load_index(locate(data.path, data.read_timeout, data.read_attempts), verify=False)
    for name, value in known_features(index.folder, index.features).items():
        _check(index, data, name, [value])
    chosen = {}
    for domain in index.domains:
        entry = index.content["domains"][domain]
        specs = {name: teacher["spec"] for name, teacher in entry["teachers"].items()}
        spec = _check(index, data, f"{domain}_teacher", list(dict.fromkeys(specs.values())))
        _check(index, data, f"{domain}_tokens", [entry["tokens"]["spec"]])
        # Two entries of one teacher differ in their rate or attention; training pools them alike.
        names, wanted = [name for name in specs if specs[name] == spec], (data.teacher_attention, data.teacher_rate)
        given = {name: (attention_layers(entry["teachers"][name]), entry["teachers"][name]["rate"]) for name in names}
        for place, setting in enumerate(("teacher_attention", "teacher_rate")):
            if getattr(data, setting) is not None:
                _check(index, data, setting, list(dict.fromkeys(of_entry[place] for of_entry in given.values())))
        names.sort(key=lambda name: [a != b for a, b in zip(given[name], wanted, strict=True)])
        chosen[domain] = names[0]
    index = replace(index, chosen=chosen, normalize=data.normalize)
    return index if data.text is None else _with_text(index, load_text(data.text))


def _with_text(index: Index, text: TextIds) -> Index:
    """Return the index of the clips with a transcript of their own. Shards of version 0.1 do not say which these are:
    then their descriptions are read. Raises UserError if they are behind a URL, or if there is no such clip."""
    shards = index.content["shards"]
    if any("transcribed" not in entry for entry in shards):
        if isinstance(index.folder, Remote):
            raise UserError(
                f"{index.folder}/{INDEX} does not say which clips have a transcript of their own: copy the shards to a "
                "local folder, or prepare the recordings again"
            )
        read = tqdm(shards, desc="transcripts", unit="shard", delay=5)
        of_clips = ((entry, read_descriptions(index.folder / entry["file"])) for entry in read)
        shards = [entry | {"transcribed": transcribed(clip for _, clip in clips)} for entry, clips in of_clips]
    index = replace(index, content=index.content | {"shards": shards}, text=text)
    if not index.domains:
        raise UserError(
            f"{index.folder}: data.text={text.spec}, but no training clip has a transcript of its own: prepare "
            "recordings with transcripts that are no longer than data.max_seconds, or set data.text=null"
        )
    return index


def count_transcribed(index: Index) -> str:
    """Return a line with the number of clips that a run with data.text takes, of each domain in the shards."""
    counts = []
    for domain in (domain for domain in DOMAINS if domain in index.content["domains"]):
        all_clips = replace(index, text=None)
        taken = [f"{index.clips(split, domain)} of {all_clips.clips(split, domain)}" for split in ("train", "val")]
        counts.append(f"{domain} {taken[0]} for training, {taken[1]} for validation")
    return (
        f"data.text={index.text.spec}: {index.text.size} ids; clips with a transcript of their own: "
        f"{'; '.join(counts)}; the others are left out"
    )


def known_features(folder: Location, features: dict) -> dict:
    """Return the features of an index that are settings of this version.

    A setting that earlier versions had is left out if its value is the one that this version implies, and one that
    version 0.1 had not has its default. Raises UserError for any other value, and for a feature of another version that
    this one does not know.
    """
    known = setting_names(ShardConfig)
    try:
        features = without_removed("data", features)
    except UserError as error:
        raise UserError(
            f"{folder} was prepared by an earlier version: {error}: prepare the recordings again"
        ) from error
    if unknown := sorted(features.keys() - known):
        raise UserError(
            f"{folder} was prepared with data.{unknown[0]}={features[unknown[0]]}, which this version does not know; "
            f"it knows {', '.join(known)}: use the version that prepared it, or prepare the recordings again"
        )
    return {name: getattr(ShardConfig(), name) for name in _NEW} | features


def _check(index: Index, data: DataConfig, name: str, prepared: list[object]) -> object:
    """Return the run's value of a setting. Raises UserError if the shards were not prepared with it."""
    value = getattr(data, name)
    if value not in prepared:
        values = " or ".join(map(str, prepared))
        raise UserError(
            f"{index.folder} was prepared with data.{name}={values}, the run has {value}: set data.{name}={values}, "
            "or prepare the recordings again"
        )
    return value
