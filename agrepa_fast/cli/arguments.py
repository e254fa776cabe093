"""Helpers of all commands: they add a command and its arguments, and check the types of arguments."""

import argparse
import textwrap
from pathlib import Path

from ..errors import UserError
from ..files import local_path

OVERRIDES = "[section.field=value ...]"


def add_command(commands, name: str, about: str, example: str, usage: str = "") -> argparse.ArgumentParser:
    """Add a command or an action. Its help fits 80 columns and 24 lines. example: a line that a user types, shown below
    the options. usage: the arguments, as the first line shows them."""
    command = commands.add_parser(
        name,
        usage=f"%(prog)s {usage}".rstrip(),
        help=about,
        description=textwrap.fill(about, 78),
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    command.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    return command


def add_checkpoint(
    command: argparse.ArgumentParser, about: str = "runs/<run>, one of its checkpoints, or an export", **options
) -> None:
    command.add_argument("checkpoint", type=a_path, help=about, **options)
    command.add_argument("--live", action="store_true", help="the live weights instead of their moving average")
    command.add_argument("--out", type=a_path, help="folder to write to (default: beside checkpoints/)")
    add_overrides(command)


def add_overrides(
    command: argparse.ArgumentParser, metavar: str = "section.field=value", about: str = argparse.SUPPRESS
) -> None:
    """Add the overrides of settings. Without `about` the usage line alone names them."""
    command.add_argument("overrides", nargs="*", metavar=metavar, help=about)


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
