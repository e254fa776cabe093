"""`agrepa doctor`: report installed packages, the backend that would run, and commands that install what is missing."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

from packaging.requirements import Requirement

from .config_file import load_config
from .errors import UserError, one_line
from .fetch import cache_dir
from .kernels import active_backend, native_isa

USES = {  # of packages that are optional
    "triton": "the GPU kernels",
    "flash-attn": "attention over padded batches with dropout, on GPUs",
    "vocos": "the vocoder of 24 kHz / 100-mel presets; HiFi-GAN or Griffin-Lim runs without it",
    "datasets": "agrepa prepare hf",
    "vector-quantize-pytorch": "agrepa tokens fit",
    "s3tokenizer": "S3 tokens: data.speech_tokens=s3:NAME",
    "pocketsphinx": "phones as tokens: data.speech_tokens=phones",
    "f5-tts": "F5-TTS and E2: model.backbone=f5, and text by data.text=pinyin:FILE or package:f5",
    "onnxruntime": "data.speaker=campplus:FILE.onnx, metrics.mos=package:dnsmos",
    "speechbrain": "BEATs as a teacher: beats:FILE",
    "wandb": "logging to Weights & Biases: train.wandb=PROJECT",
}


def report() -> None:
    """Print the table. Exit with code 1 if a required package is missing or too old."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    required, optional = _requirements()
    table = Table(title="agrepa doctor")
    for column in ("what", "found", "if it is missing"):
        table.add_column(column)
    table.add_row("python", platform.python_version(), "")
    for requirement in required:
        table.add_row(requirement.name, _version(requirement.name) or "missing", _remedy(requirement))
    for requirement in optional:
        found = _version(requirement.name)
        advice = _remedy(requirement) and f"{_remedy(requirement)}: {USES.get(requirement.name, 'an extra')}"
        table.add_row(requirement.name, found or "not installed (optional)", advice)
    for command, advice in {
        "deepspeed": "pip install deepspeed: the launcher of several ranks",
        "apt-get": "Debian or Ubuntu only: fetches the demo corpus (agrepa prepare demo)",
    }.items():
        found = shutil.which(command)
        table.add_row(f"command {command}", found or "not found", "" if found else advice)
    table.add_row("device", *_device())
    table.add_row("kernels backend", active_backend(), "")
    isa = native_isa()
    table.add_row(
        "CPU library",
        f"built, {isa}" if isa else "not built: the references run on CPUs",
        "" if isa else "install a C++ compiler (apt-get install g++), then pip install -e . again",
    )
    for row in _cache():
        table.add_row(*map(escape, row))
    shards = Path(load_config("demo").data.path)
    prepared = (shards / "index.json").is_file()
    table.add_row("demo shards", str(shards) if prepared else "not prepared", "" if prepared else "agrepa prepare demo")
    Console(width=shutil.get_terminal_size((120, 40)).columns).print(table)
    if any(_remedy(requirement) for requirement in required):
        raise SystemExit(1)


def _cache() -> list[tuple[str, str, str]]:
    """Return the rows about the cache and the packages in it."""
    try:
        cache = cache_dir()
        packages = sorted(path.name for kind in ("apt", "pip") for path in (cache / kind).glob("*"))
        parent = next(path for path in (cache, *cache.parents) if path.exists())
    except (UserError, OSError) as error:
        return [("cache", "no place for it", one_line(error))]
    writable = "" if os.access(parent, os.W_OK | os.X_OK) else f"{parent} is read-only: set AGREPA_CACHE to fetch more"
    return [("cache", str(cache), writable), *(("fetched package", name, "") for name in packages)]


def _requirements() -> tuple[list[Requirement], list[Requirement]]:
    """Return the requirements of setup.py, and its extras for users, without those of the tests."""
    try:
        stated = importlib.metadata.requires("agrepa_fast") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("agrepa_fast is not installed here: run pip install -e . in its folder") from error
    required, optional = [], [Requirement("flash-attn")]
    for requirement in map(Requirement, stated):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            required.append(requirement)
        elif requirement.name not in {other.name for other in optional} and requirement.name in USES:
            optional.append(requirement)
    return required, optional


def _remedy(requirement: Requirement) -> str:
    """Return the command that installs a package, or "" if the installed version fits."""
    found = _version(requirement.name)
    if found is not None and requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"pip install '{requirement.name}{requirement.specifier}'"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, bf16", ""
    return f"CPU, {os.cpu_count()} cores, fp32 or bf16", "a CUDA build of torch trains in bf16 on GPUs"
