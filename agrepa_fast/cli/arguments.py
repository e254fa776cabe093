"""Helpers of all commands: they add a command and its arguments, and check the types of arguments."""

import argparse
from pathlib import Path

from ..errors import UserError
from ..files import local_path


def add_command(commands, name: str, about: str, example: str) -> argparse.ArgumentParser:
    """Add a command or an action. example: what a user types, shown below its options."""
    return commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_checkpoint(
    command: argparse.ArgumentParser, about: str = "runs/<run>, one of its checkpoints, or an export", **options
) -> None:
    command.add_argument("checkpoint", type=a_path, help=about, **options)
    command.add_argument("--live", action="store_true", help="the live weights instead of their moving average")
    command.add_argument("--out", type=a_path, help="folder to write to (default: beside the run's checkpoints)")
    command.add_argument("overrides", nargs="*", metavar="section.field=value")


def a_count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 1 to 999999999")
    return int(text)


def a_path(text: str) -> Path:
    return Path(a_location(text))


def a_location(text: str) -> str:
    """Return a path or a URL, with ~ for the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: a path is wanted")
    try:
        return str(local_path(text)) if text.startswith("~") else text
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
