"""Read and write configurations: presets, yaml files and `section.field=value` overrides."""

import copy
import dataclasses
import functools
import json
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import OF_SHARDS, PRESETS, Config
from .errors import UserError, nearest
from .files import local_path, read_text, write_atomically
from .settings import allowed, base_type, setting_names
from .text_yaml import dump, parse

_SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(Config)}

# Settings of earlier versions: the value that this version always has, if there is one, and the replacement.
_REMOVED: dict[str, tuple[Callable[[dict], object], str]] = {
    "data.win_length": (lambda data: data.get("n_fft", 1024), "windows are data.n_fft samples long"),
    "data.f_min": (lambda data: 0.0, "mel bands start at 0 Hz"),
    "align.share_confidence": (lambda align: 0.9, "align.share is reached with 90 % confidence"),
    "probe.max_rows": (lambda probe: None, "lower probe.chunk to bound a probe's memory"),
    "train.attention_cost": (lambda train: None, "train.batch_frames takes it from the model's FLOPs"),
    "eval.samples": (lambda values: 1, "`agrepa sample RUN --clips N` makes more samples"),
}

_REFERENCE_HEAD = """# Configuration

<!-- Written by `agrepa config --reference`; the tests compare it with agrepa_fast/config.py. -->

`train`, `probe`, `sample`, `evaluate`, `compare` and `config` take `section.field=value`, `prepare` takes those of
`data`. A run starts from a preset (`--preset NAME` or a yaml file), applies the overrides and saves the result as
`config.yaml` in its folder; `agrepa config PRESET section.field=value` prints it without running anything, and
`agrepa config RUN` that of a run. An unknown name, a wrong type and a value out of bounds end a command with one line
and exit code 2. A resumed run may change the settings marked °; it must leave all others as they were.

An override of `model.backbone` drops the sizes and options that the preset has for its own model: give the new model's
as `model.options.NAME=value`.

A value on the command line is the text that was typed: `run.dir=20241128_153000` and `run.dir=1e5` are names, and so is
`run.dir=None`. Only `null` stands for no value, where the setting takes null. Lists are written `[0.5,0.7]`. In a file,
a plain `null`, `~` or nothing at all stands for no value: put a name like these in quotes. `~/` at the start of a path
is the home folder, and a relative path starts at the working directory, wherever the path is written: in an override, a
file, an option or `AGREPA_CACHE`. Files are UTF-8, with or without a byte order mark. Numbers are finite
(except `train.clip_norm=inf`, which only measures) and fit 32 bits, seeds 64.

Presets: `demo` and `demo-f5` (minutes on two CPU cores), `demo-long` (half an hour), `agrepa-a` (the paper's
24 x 1024), `agrepa-b` (with a second token), `agrepa-xl` (30 x 1664), and [those of other models](models.md). Defaults
below are those of a file that sets nothing; `agrepa config demo` shows the demo's."""


def preset_names() -> list[str]:
    """Return the names that load_config takes besides files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a preset or a yaml file, with `section.field=value` overrides. An override of
    model.backbone leaves out the sizes and options of the file's model.

    Raises UserError for an unknown preset, section or setting, a value of the wrong type or out of bounds, and a
    setting of an earlier version that this one cannot honour.
    """
    path = PRESETS / f"{source}.yaml"
    if path.is_file():
        given = copy.deepcopy(_read_preset(path))
    else:
        path = local_path(source)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise UserError(f"preset {str(source)!r} is unknown: {nearest(str(source), preset_names())}")
        given = _read_file(path)
    sections: dict[str, dict] = {name: {} for name in _SECTIONS}
    sections["run"]["preset"] = path.stem
    typed = _read_overrides(overrides)
    if "model" in given:
        given["model"] = _without_another_models(given["model"], typed.get("model", {}))
    for values in (given, typed):
        for name, settings in values.items():
            _merge(sections[name], settings)
    return Config(**{name: _SECTIONS[name](**values) for name, values in sections.items()})


def _without_another_models(given: dict, typed: dict) -> dict:
    """Return a file's model settings, without those of its model if an override names another. Classes of one module of
    a user's share their options."""
    module, other = (str(values.get("backbone", "audio_dit")).partition(":")[0] for values in (given, given | typed))
    return given if module == other else {name: value for name, value in given.items() if name in OF_SHARDS}


def check_used(overrides: Sequence[str], uses: Sequence[str]) -> None:
    """Raise UserError for an override that a command has no use for. uses: sections, or single settings."""
    for name in (override.partition("=")[0] for override in overrides):
        if name not in uses and name.partition(".")[0] not in uses:
            known = ", ".join(part if "." in part else f"{part}.*" for part in uses)
            raise UserError(f"{name} has no effect here: {known} have")


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration. A kill leaves the old file or the new one."""
    write_atomically(path, config_yaml(config))


def config_yaml(config: Config) -> str:
    """Return the configuration as load_config reads it."""
    return dump(dataclasses.asdict(config))


def settings_that_differ(saved: Config, config: Config) -> list[tuple[str, object, object]]:
    """Return name, saved value and value of each setting that a resume must leave as it was saved, and that differs."""
    differing = []
    for section in dataclasses.fields(Config):
        before, after = getattr(saved, section.name), getattr(config, section.name)
        for field in dataclasses.fields(before):
            old, new = getattr(before, field.name), getattr(after, field.name)
            if old != new and not field.metadata["resume"]:
                differing.append((f"{section.name}.{field.name}", old, new))
    return differing


@functools.cache
def _read_preset(path: Path) -> dict[str, dict]:
    """Return the sections of a packaged preset, which no one changes."""
    return _read_file(path)


def _read_file(path: Path) -> dict[str, dict]:
    """Return the sections of a yaml file, without removed settings."""
    try:
        content = parse(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"{path}: sections with fields are wanted, not a {type(content).__name__}")
    sections = {}
    for name, values in (content or {}).items():
        if name not in _SECTIONS:
            raise UserError(f"{path}: section {name!r} is unknown: {nearest(str(name), _SECTIONS)}")
        if not isinstance(values, dict | None):
            raise UserError(f"{path}: section {name!r} has the value {reprlib.repr(values)}, not settings")
        for field, value in (values or {}).items():
            _check_name(name, str(field))
            _refuse_expression(f"{path}: {name}.{field}", value)
        sections[name] = without_removed(name, values or {})
    return sections


def _read_overrides(overrides: Sequence[str]) -> dict[str, dict]:
    """Return the sections that overrides set, without removed settings."""
    sections: dict[str, dict] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, field = name.partition(".")
        if not (equals and dot):
            raise UserError(f"{override!r} is no override: write section.field=value")
        if section not in _SECTIONS:
            raise UserError(f"section {section!r} is unknown: {nearest(section, _SECTIONS)}")
        field, dot, key = field.partition(".")  # model.options.dim
        _check_name(section, field)
        if dot and base_type(_SECTIONS[section], field) is not dict:
            raise UserError(f"{section}.{field}.{key} is unknown: {section}.{field} has no parts")
        value = {key: _parsed(override, text)} if dot else _typed_text(section, field, text)
        _merge(sections.setdefault(section, {}), {field: value})
    return {section: without_removed(section, values) for section, values in sections.items()}


def _check_name(section: str, field: str) -> None:
    """Raise UserError for a setting that this version does not have, and earlier ones had not."""
    names = setting_names(_SECTIONS[section])
    if field not in names and f"{section}.{field}" not in _REMOVED:
        raise UserError(f"{section}.{field} is unknown: {nearest(field, names)}")


def _typed_text(section: str, field: str, text: str) -> object:
    """Return a value that was typed: itself, None for null, and a list where one is wanted."""
    _refuse_expression(f"{section}.{field}", text)
    if text == "null":
        return None
    if f"{section}.{field}" in _REMOVED or base_type(_SECTIONS[section], field) not in (list, dict):
        return text
    return _parsed(f"{section}.{field}={text}", text)


def _parsed(override: str, text: str) -> object:
    try:
        return parse(text)
    except ValueError as error:
        raise UserError(f"{override}: {error}") from error


def _merge(settings: dict, later: dict) -> None:
    """Put later values over earlier ones; names and values are put together."""
    for name, value in later.items():
        both = isinstance(settings.get(name), dict) and isinstance(value, dict)
        settings[name] = settings[name] | value if both else value


def _refuse_expression(name: str, value: object) -> None:
    """Raise UserError for ${NAME}: other programs put a variable in its place, this one does not."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for text in parts:
        if isinstance(text, str) and "${" in text:
            raise UserError(f"{name}={text}: ${{…}} is not expanded: write the value")


def without_removed(section: str, values: dict) -> dict:
    """Return a section's values without settings of earlier versions that have the value which this one implies. Raises
    UserError for one that has another."""
    for field, value in values.items():
        implied, instead = _REMOVED.get(f"{section}.{field}", (None, None))
        if implied is not None and not _same(value, implied(values)):
            raise UserError(f"{section}.{field}={value} is no longer a setting: {instead}")
    return {field: value for field, value in values.items() if f"{section}.{field}" not in _REMOVED}


def _same(value: object, implied: object) -> bool:
    """Whether two values are equal; numbers may be written as texts."""
    try:
        return float(value) == float(implied)
    except (TypeError, ValueError, OverflowError):
        return value == implied


def config_reference() -> str:
    """Return docs/configuration.md: every setting with its default, its allowed values and its meaning."""
    lines = [_REFERENCE_HEAD]
    for part in dataclasses.fields(Config):
        cls = part.default_factory
        about = " ".join(cls.__doc__.split())
        lines += [f"\n## {part.name}\n", f"{about}\n", "| setting | default | takes | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(cls):
            default = getattr(cls(), field.name)
            takes, meaning = allowed(cls, field.name), field.metadata["meaning"].replace("<", "&lt;")
            mark = " °" if field.metadata["resume"] else ""
            default = json.dumps(default) if not isinstance(default, str) else default
            lines.append(f"| `{part.name}.{field.name}`{mark} | `{default}` | {takes} | {meaning} |")
    lines += ["\n## Settings of earlier versions\n", "| setting | instead |", "|---|---|"]
    lines += [f"| `{name}` | {instead} |" for name, (_, instead) in _REMOVED.items()]
    return "\n".join(lines) + "\n"
