"""agrepa report and agrepa listen."""

import argparse

from ..errors import UserError
from .arguments import a_count, a_path, add_command


def add_report(commands) -> None:
    about = "write report.html of a run or an evaluation, in one file"
    report = add_command(commands, "report", about, "agrepa report runs/mine", "folder")
    report.add_argument("folder", type=a_path, help="runs/<run>, or its evaluate-…")
    report.set_defaults(command=_report)


def add_listen(commands) -> None:
    about = "make a blind listening test as one page; evaluate its ratings"
    listen = add_command(
        commands, "listen", about, "agrepa listen runs/a runs/b --out page --kind pairwise", "[options] [RUN ...]"
    )
    listen.add_argument(
        "systems",
        nargs="*",
        type=a_path,
        metavar="RUN",
        help="an evaluated run, its evaluate-… or a folder of recordings",
    )
    listen.add_argument("--out", type=a_path, help="folder of listen.html and answers.json, or of results.json")
    listen.add_argument(
        "--kind",
        choices=("mos", "pairwise"),
        help="mos: a score of 1 to 5 per clip (default); pairwise: the better of two",
    )
    listen.add_argument("--clips", type=a_count, metavar="N", help="how many (default: 20)")
    listen.add_argument("--seed", type=int, metavar="N", help="of the choice of clips and of their order (default: 0)")
    listen.add_argument(
        "--truth", type=a_path, metavar="FOLDER", help="recordings of the truth; evaluated runs have them"
    )
    listen.add_argument("--ratings", type=a_path, metavar="FOLDER", help="the files that listeners have sent")
    listen.add_argument("--answers", type=a_path, metavar="FILE", help="answers.json of the test that they rate")
    listen.set_defaults(command=_listen)


def _report(args: argparse.Namespace) -> None:
    from ..reporting.report import write_report

    print(f"wrote {write_report(args.folder)}")


def _listen(args: argparse.Namespace) -> None:
    making = {
        name: getattr(args, name) for name in ("kind", "clips", "seed", "truth") if getattr(args, name) is not None
    }
    if args.ratings is None and args.answers is None:
        if not args.systems or args.out is None:
            raise UserError("name the systems to listen to and --out FOLDER; or --ratings FOLDER and --answers FILE")
        from ..reporting.listen.build import make_test

        print(make_test(args.systems, args.out, **({"kind": "mos", "seed": 0, "clips": 20} | making)))
        return
    if args.ratings is None or args.answers is None:
        raise UserError(
            "--ratings FOLDER and --answers FILE belong together: the answers name the systems that were rated"
        )
    if unused := [*map(str, args.systems), *(f"--{name}" for name in making)]:
        raise UserError(f"{', '.join(unused)}: without effect with --ratings")
    from ..reporting.listen.results import print_results, rate, write_results

    results = rate(args.ratings, args.answers)
    path = write_results(results, args.out or args.answers.parent)
    print_results(results)
    print(f"wrote {path}")
