"""Whether shards were made with the settings of a run."""

from dataclasses import replace

from ..config import DataConfig
from ..config_file import without_removed
from ..errors import UserError
from .index import Index, load_index
from .locations import locate


def matching_index(data: DataConfig) -> Index:
    """The index of data.path, with the teachers that `data` names. Raises UserError, too, when its features were made
    with other settings than `data`'s, or without such a teacher. Of local files the sizes are checked, of
    others nothing."""
    index = load_index(locate(data.path, data.read_timeout, data.read_attempts), verify=False)
    for name, there in without_removed("data", index.features).items():
        if there != getattr(data, name):
            _refuse(index, name, there, getattr(data, name))
    chosen = {}
    for domain in index.domains:
        name = f"{domain}_teacher"
        entries = index.content["domains"][domain]["teachers"]
        of_spec = [key for key, entry in entries.items() if entry["spec"] == getattr(data, name)]
        if not of_spec:
            specs = dict.fromkeys(entry["spec"] for entry in entries.values())
            _refuse(index, name, " or ".join(specs), getattr(data, name))
        # Two entries of one teacher differ in their rate; training pools them alike.
        chosen[domain] = next((key for key in of_spec if entries[key]["rate"] == data.teacher_rate), of_spec[0])
        there, name = index.content["domains"][domain]["tokens"]["spec"], f"{domain}_tokens"
        if there != getattr(data, name):
            _refuse(index, name, there, getattr(data, name))
    return replace(index, chosen=chosen)


def _refuse(index: Index, name: str, there: object, here: object) -> None:
    raise UserError(
        f"{index.folder} was prepared with data.{name}={there}, the run has {here}: set data.{name}={there}, "
        "or prepare the recordings again"
    )
