"""`agrepa doctor`: what is installed, which backend would run, what is missing and how to get it."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

from .config_file import load_config
from .fetch import cache_dir
from .kernels import active_backend, native_isa

REQUIRED = ("torch", "torchaudio", "deepspeed", "webdataset", "transformers", "omegaconf", "safetensors", "numpy")
REQUIRED += ("scipy", "soundfile", "av", "matplotlib", "tensorboard", "tqdm", "rich")
OPTIONAL = {
    "triton": "pip install 'triton>=3.6,<3.10': the GPU kernels",
    "flash-attn": "pip install flash-attn, on GPUs: attention over padded batches without a mask",
    "speechbrain": "pip install speechbrain: BEATs as a teacher (beats:FILE)",
    "vocos": "pip install vocos, for 24 kHz / 100-mel presets; HiFi-GAN or Griffin-Lim runs without it",
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def report() -> None:
    """Print the table. Exits with code 1 when a required package is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="agrepa doctor")
    for column in ("what", "found", "if it is missing"):
        table.add_column(column)
    missing = [package for package in REQUIRED if _version(package) is None]
    table.add_row("python", platform.python_version(), "")
    for package in REQUIRED:
        table.add_row(package, _version(package) or "missing", "" if _version(package) else f"pip install {package}")
    for package, advice in OPTIONAL.items():
        table.add_row(package, _version(package) or "not installed (optional)", "" if _version(package) else advice)
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
    cache = cache_dir()
    for name in sorted(path.name for kind in ("apt", "pip") for path in (cache / kind).glob("*")):
        table.add_row("fetched package", name, "")
    shards = Path(load_config("demo").data.path)
    there = (shards / "index.json").is_file()
    table.add_row("demo shards", str(shards) if there else "not prepared", "" if there else "agrepa prepare demo")
    Console(width=int(os.environ.get("COLUMNS", 120))).print(table)
    if missing:
        raise SystemExit(1)


def _device() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, bf16", ""
    return f"CPU, {os.cpu_count()} cores, fp32", "a CUDA build of torch trains in bf16 on GPUs"
