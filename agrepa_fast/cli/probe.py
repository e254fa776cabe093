"""agrepa probe."""

import argparse
from pathlib import Path

from ..config import MEASURES, RECIPES
from ..errors import UserError, nearest
from ..files import check_writable
from .arguments import OVERRIDES, add_checkpoint, add_command

MODEL_OPTIONS = {  # of `agrepa probe --model`
    "--row-arguments": "arguments with a row per clip",
    "--state": "the argument that a block updates",
    "--velocity": "the velocity's field in the output",
}
MODEL_FLAGS = {
    "--per-call": "a layer is one call of a block",
    "--verify": "compare all layers with plain forwards",
    "--traceback": "show errors of the model's code whole",
}
PROBE_MEASURES = tuple(measure for measure in MEASURES if measure != "gradnorm")  # gradnorm needs a training step


def add_probe(commands) -> None:
    about = "measure what layers contribute to the velocity and store"
    usage = f"[options] [RUN|CHECKPOINT|EXPORT] {OVERRIDES}"
    probe = add_command(commands, "probe", about, "agrepa probe runs/mine --measures foga,cka", usage)
    probe.add_argument(
        "--measures",
        type=_measures,
        metavar="M,M,…",
        help=f"of {', '.join(PROBE_MEASURES)} (default: those possible, but not foga-vjp); the first chooses layers",
    )
    about = "corrected (default), or official: as the released code"
    probe.add_argument("--recipe", default="corrected", choices=RECIPES, metavar="NAME", help=about)
    probe.add_argument("--model", metavar="MODULE:FACTORY", help="probe any model: FACTORY() is (model, inputs)")
    probe.add_argument("--blocks", metavar="PATH", help="its blocks: layers, or layers.*.attn,layers.*.ff")
    about = "block (default), or branch: attention and FFN apart"
    probe.add_argument("--kind", default="block", choices=("block", "branch"), metavar="NAME", help=about)
    for name, about in MODEL_OPTIONS.items():
        options = {"nargs": "*"} if name == "--row-arguments" else {}
        probe.add_argument(name, metavar="NAME", help=f"with --model: {about}", **options)
    for name, about in MODEL_FLAGS.items():
        probe.add_argument(name, action="store_true", help=f"with --model: {about}")
    add_checkpoint(probe, about=argparse.SUPPRESS, nargs="?")  # --model stands in for it
    probe.set_defaults(command=_probe)


def _measures(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PROBE_MEASURES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: {nearest(unknown[0], PROBE_MEASURES)}")
    return sorted(names, key=PROBE_MEASURES.index)


def _probe(args: argparse.Namespace) -> None:
    from ..attribution.csv import read_csv

    if args.out is not None or args.model is not None:
        out = args.out or Path("probe")
        check_writable(out, "--out")
        read_csv(out / "attribution.csv")  # a file that rows cannot be appended to is refused before the work
    from ..probing.measure import ProbeRequest
    from ..reporting.probe import probe_checkpoint

    if args.model is not None:
        _probe_any_model(args)
        return
    given = {
        name: getattr(args, name.strip("-").replace("-", "_")) for name in ("--blocks", *MODEL_OPTIONS, *MODEL_FLAGS)
    }
    if ignored := [name for name, value in given.items() if value not in (None, False)]:
        raise UserError(f"{', '.join(ignored)}: without effect but with --model MODULE:FACTORY")
    if args.checkpoint is None:
        raise UserError("name a checkpoint, or --model MODULE:FACTORY with --blocks PATH")
    request = ProbeRequest(args.measures and tuple(args.measures), args.recipe, args.kind)
    probe_checkpoint(args.checkpoint, args.overrides, request, live=args.live, out=args.out)


def _probe_any_model(args: argparse.Namespace) -> None:
    from ..reporting.any_model import ModelRequest, probe_any_model

    if (args.measures or ["foga"]) != ["foga"] or args.recipe != "corrected":
        raise UserError("--model: only foga in the corrected recipe measures models that are not AudioDiT")
    ignored = [str(args.checkpoint)] if args.checkpoint is not None else []
    if ignored := [*ignored, *args.overrides, *(["--live"] if args.live else [])]:
        raise UserError(
            f"{', '.join(ignored)}: without effect with --model, which measures the factory's model at its inputs"
        )
    request = ModelRequest(
        args.model,
        args.blocks,
        args.kind,
        args.row_arguments,
        args.state,
        args.velocity,
        per_call=args.per_call,
        **({"verify": None} if args.verify else {}),
        traceback=args.traceback,
    )
    probe_any_model(request, args.out or Path("probe"))
