"""Texts, labels, groups and licences under the names that other people's corpora give them."""

from .recordings import printable

# Names of members' json fields and of table columns; the first one present counts.
TEXTS = ("text", "sentence", "transcription", "transcript", "caption", "captions", "normalized_text")
LABELS = ("labels", "label", "tags", "human_labels", "category", "class")
GROUPS = ("speaker_id", "speaker", "client_id", "video_id", "youtube_id")  # their clips never meet across the splits
LICENCES = ("licence", "license")
MAX_DESCRIPTION = 2**20  # bytes of a .txt or .json


def recording_fields(fields: dict, texts: tuple[str, ...] = TEXTS, labels: tuple[str, ...] = LABELS) -> dict:
    """Return a Recording's text, labels, group and licence from the json of a sample or the row of a table."""

    def first_of(names: tuple[str, ...]) -> tuple[str, ...]:
        return next((words for name in names if (words := _words(fields.get(name)))), ())

    text, group, licence = (next(iter(first_of(names)), "") for names in (texts, GROUPS, LICENCES))
    return {"text": text, "labels": first_of(labels), "group": group, "licence": licence or "unknown"}


def _words(value: object) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(word for item in value for word in _words(item))
    if isinstance(value, str | int) and not isinstance(value, bool):
        return (text,) if (text := printable(" ".join(str(value).split()))) else ()
    return ()
