"""Train audio flow-matching transformers whose alignment goes to the layers that cause the velocity."""

import argparse
import os
import sys

from ..errors import UserError, one_line, print_any_name
from .checkpoints import add_evaluate, add_export, add_sample
from .compare import add_compare
from .configuration import add_config, add_doctor
from .pages import add_listen, add_report
from .prepare import add_prepare, add_tokens
from .probe import add_probe


def main(argv: list[str] | None = None) -> None:
    """Run one command. Bad input prints one line and exits with code 2, and so does a file that cannot be read or
    written."""
    print_any_name()
    # deepspeed's launcher passes the rank as an argument, too.
    argv = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank=")]
    if argv[:1] == ["train"]:  # train.py has its own arguments: the deepspeed launcher runs it, too
        from ..train import run_process

        run_process(argv[1:])
        return
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if unknown := [argument for argument in rest if argument.startswith("-") or "overrides" not in args]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:  # overrides after an option
        args.overrides += rest
    try:
        _check_backend()
        args.command(args)
        if sys.stdout is not None:  # >&-
            sys.stdout.flush()
    except BrokenPipeError:  # `agrepa config | head` has read enough
        _close_stdout()
    except (UserError, OSError) as error:
        print(f"agrepa {args.name}: {one_line(error)}", file=sys.stderr)
        _close_stdout()
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"agrepa {args.name}: interrupted", file=sys.stderr)
        sys.exit(130)


def _close_stdout() -> None:
    """Drop the output that could not be written, on a full disk for one: Python would try again at exit, and fail."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_backend() -> None:
    from ..kernels import active_backend

    try:
        active_backend()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agrepa", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    commands.add_parser("train", help="train, probe and align (options: agrepa train --help)", add_help=False)
    for add in (
        *(add_prepare, add_tokens, add_probe, add_sample, add_evaluate, add_compare, add_listen, add_report),
        *(add_export, add_config, add_doctor),
    ):
        add(commands)
    return parser
