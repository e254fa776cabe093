"""agrepa config and agrepa doctor."""

import argparse

from ..config_file import config_reference, config_yaml, load_config
from ..errors import UserError
from ..files import local_path
from .arguments import OVERRIDES, add_command, add_overrides


def add_config(commands) -> None:
    about = "print the resolved configuration of a preset, file or run"
    example = "agrepa config agrepa-a train.batch_clips=256 > mine.yaml"
    config = add_command(commands, "config", about, example, f"[options] [preset] {OVERRIDES}")
    config.add_argument(
        "preset", nargs="?", default="demo", help="a preset, a yaml file or a run's folder (default: demo)"
    )
    config.add_argument("--reference", action="store_true", help="print every setting and its meaning, as markdown")
    config.add_argument("--objectives", action="store_true", help="print the alignment objectives, as markdown")
    add_overrides(config)
    config.set_defaults(command=_config)


def add_doctor(commands) -> None:
    about = "report installed and missing packages, and the backend"
    add_command(commands, "doctor", about, "agrepa doctor").set_defaults(command=_doctor)


def _config(args: argparse.Namespace) -> None:
    pages = [name for name in ("--reference", "--objectives") if getattr(args, name.strip("-"))]
    if pages and (args.preset != "demo" or args.overrides):
        raise UserError(f"{args.preset}: without effect with {pages[0]}, which prints a page of all")
    if "=" in args.preset:  # overrides of the default preset
        args.preset, args.overrides = "demo", [args.preset, *args.overrides]
    if args.objectives:
        from ..reporting.objectives import objectives_reference

        print(objectives_reference(), end="")
        return
    saved = local_path(args.preset) / "config.yaml"
    text = config_yaml(load_config(saved if saved.is_file() else args.preset, args.overrides))
    print(config_reference() if args.reference else text, end="")


def _doctor(args: argparse.Namespace) -> None:
    from ..doctor import report

    report()
