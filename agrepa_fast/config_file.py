"""Read and write configurations: presets, yaml files and `section.field=value` overrides."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import PRESETS, Config
from .errors import UserError, nearest
from .files import write_atomically
from .settings import allowed, setting_names

_SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(Config)}

# Settings of earlier versions: the value that this version always has, if there is one, and what to do instead.
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

Every command takes `section.field=value`. A run starts from a preset (`--preset NAME` or a yaml file), applies the
overrides and saves the result as `config.yaml` in its folder; `agrepa config PRESET section.field=value` prints it
without running anything. An unknown name, a wrong type and a value out of bounds end a command with one line and exit
code 2. A resumed run may change the settings marked °; it must leave all others as they were.

Presets: `demo` (minutes on two CPU cores), `agrepa-a` (the paper's 24 x 1024), `agrepa-b` (with a second token),
`agrepa-xl` (30 x 1664). Defaults below are those of a file that sets nothing; `agrepa config demo` shows the demo's."""


def preset_names() -> list[str]:
    """Return the names that load_config takes besides files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a preset or a yaml file, with `section.field=value` overrides.

    Raises UserError for an unknown preset, section or setting, a value of the wrong type or out of bounds, and a
    setting of an earlier version that this one cannot honour.
    """
    path = PRESETS / f"{source}.yaml"
    if not path.is_file():
        path = Path(source)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise UserError(f"preset {str(source)!r} is unknown: {nearest(str(source), preset_names())}")
    for override in overrides:
        _check_override(override)
    sections: dict[str, dict] = {name: {} for name in _SECTIONS}
    sections["run"]["preset"] = path.stem
    for values in (_read_file(path), _read_overrides(overrides)):
        for name, settings in values.items():
            sections[name] |= settings
    return Config(**{name: _SECTIONS[name](**values) for name, values in sections.items()})


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration. A kill leaves the old file or the new one."""
    write_atomically(path, config_yaml(config))


def config_yaml(config: Config) -> str:
    """Return the configuration as load_config reads it."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


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


def _read_file(path: Path) -> dict[str, dict]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        content = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(content):
        raise UserError(f"{path}: sections with fields are wanted, not a {type(OmegaConf.to_object(content)).__name__}")
    return _checked(content, str(path))


def _read_overrides(overrides: Sequence[str]) -> dict[str, dict]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    text = " ".join(overrides)
    try:
        return _checked(OmegaConf.from_dotlist(list(overrides)), text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{text}: {' '.join(str(error).split())}") from error


def _checked(content, where: str) -> dict[str, dict]:
    """Return the sections of omegaconf's `content` as dicts, without removed settings. where: a file or overrides."""
    from omegaconf import OmegaConf

    sections = OmegaConf.to_container(content, resolve=False)
    # omegaconf would resolve it: ${oc.env:NAME} is a variable of the environment.
    if "${" in json.dumps(sections, default=str):
        raise UserError(f"{where}: ${{…}} is not expanded: write the value")
    for name, values in sections.items():
        if name not in _SECTIONS:
            raise UserError(f"{where}: section {name!r} is unknown: {nearest(str(name), _SECTIONS)}")
        if values is None:
            sections[name] = {}
        elif not isinstance(values, dict):
            raise UserError(f"{where}: section {name!r} has the value {values!r}, not settings")
        else:
            sections[name] = without_removed(name, values)
    return sections


def without_removed(section: str, values: dict) -> dict:
    """Return a section's values without settings of earlier versions that have the value which this one implies. Raises
    UserError for one that has another."""
    for field, value in values.items():
        implied, instead = _REMOVED.get(f"{section}.{field}", (None, None))
        if implied is not None and value != implied(values):
            raise UserError(f"{section}.{field}={value} is no longer a setting: {instead}")
    return {field: value for field, value in values.items() if f"{section}.{field}" not in _REMOVED}


def _check_override(override: str) -> None:
    name, equals, _ = override.partition("=")
    section, dot, field = name.partition(".")
    if not (equals and dot):
        raise UserError(f"{override!r} is no override: write section.field=value")
    if section not in _SECTIONS:
        raise UserError(f"section {section!r} is unknown: {nearest(section, _SECTIONS)}")
    if name not in _REMOVED and field not in setting_names(_SECTIONS[section]):
        raise UserError(f"{name} is unknown: {nearest(field, setting_names(_SECTIONS[section]))}")


def config_reference() -> str:
    """Return docs/configuration.md: every setting with its default, what it takes and what it means."""
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
