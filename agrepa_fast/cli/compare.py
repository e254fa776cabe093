"""agrepa compare."""

import argparse
import re
from pathlib import Path

from ..errors import UserError
from .arguments import a_count, a_path, add_command, add_overrides

_COMMA = re.compile(r",(?![0-9 ])")  # not those of fixed:4,8,12
_TRAINING = ("--strategies", "--seeds", "--preset", "--warmup", "--ds_config", "--ranks", "--dry-run")


def add_compare(commands) -> None:
    about = "train and evaluate strategies with several seeds; compare runs"
    example = "agrepa compare --strategies none,shallow,foga train.steps=600"
    compare = add_command(commands, "compare", about, example, "[options] [RUN ... or section.field=value ...]")
    compare.add_argument(
        "--strategies",
        action="append",
        metavar="S,S,…",
        help="as align.strategy; or one arm LABEL:section.field=value,…; may be repeated; the first is the baseline",
    )
    compare.add_argument("--seeds", type=_seeds, metavar="N,N,…", help="of run.seed (default: 0,1,2)")
    compare.add_argument("--preset", help="preset or yaml file of the runs (default: demo)")
    about = "of the one warm-up per seed (default: probe.warmup_steps)"
    compare.add_argument("--warmup", type=a_count, metavar="STEPS", help=about)
    compare.add_argument("--ds_config", metavar="FILE", help="default: zero2.json")
    compare.add_argument("--ranks", type=a_count, metavar="N", help="default: as many as deepspeed's launcher finds")
    compare.add_argument("--dry-run", action="store_true", default=None, help="print the plan alone")
    compare.add_argument("--baseline", metavar="S", help="default: the first strategy")
    compare.add_argument("--out", type=a_path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    add_overrides(compare, "RUN or section.field=value")
    compare.set_defaults(command=_compare)


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no list of seeds such as 0,1,2")
    return [int(part) for part in parts]


def _compare(args: argparse.Namespace) -> None:
    from ..reporting.comparison import compare_runs, compare_strategies

    runs = [Path(a_path(text)) for text in args.overrides if "=" not in text]
    overrides = [text for text in args.overrides if "=" in text]
    if args.strategies is None:
        given = [name for name in _TRAINING if getattr(args, name.strip("-").replace("-", "_")) is not None]
        if ignored := [*given, *overrides]:
            raise UserError(f"{', '.join(ignored)}: without effect but with --strategies")
        if len(runs) < 2:
            raise UserError("name at least two runs, or --strategies to train them")
        compare_runs(runs, out=args.out, baseline=args.baseline)
        return
    if runs:
        raise UserError(f"{runs[0]}: name runs or --strategies, not both")
    strategies = [part for text in args.strategies for part in ([text] if "=" in text else _COMMA.split(text))]
    compare_strategies(
        strategies,
        args.seeds or [0, 1, 2],
        overrides,
        preset=args.preset or "demo",
        warmup=args.warmup,
        out=args.out,
        baseline=args.baseline,
        ds_config=args.ds_config or "zero2.json",
        ranks=args.ranks,
        dry_run=bool(args.dry_run),
    )
