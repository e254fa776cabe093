"""agrepa report."""

import argparse

from .arguments import a_path, add_command


def add_report(commands) -> None:
    about = "write report.html of a finished run: tables, curves, and players for its clips, in one file"
    report = add_command(commands, "report", about, "agrepa report runs/demo-20261123-210000-3f9a2b")
    report.add_argument("folder", type=a_path, help="runs/<run>")
    report.set_defaults(command=_report)


def _report(args: argparse.Namespace) -> None:
    from ..reporting.report import write_report

    print(f"wrote {write_report(args.folder)}")
