"""agrepa probe."""

import argparse
from pathlib import Path

from ..config import MEASURES, RECIPES
from ..errors import UserError, nearest
from ..files import check_writable
from .arguments import add_checkpoint, add_command

MODEL_OPTIONS = {  # of `agrepa probe --model`
    "--row-arguments": "arguments of a block that have a row per clip",
    "--state": "the argument that a block updates, if its shape does not tell",
    "--velocity": "the field of the model's output that is the velocity, if it cannot be told",
}
MODEL_FLAGS = {
    "--per-call": "a layer is one call of a block, where blocks run several times",
    "--verify": "compare every layer with a forward of its own, not four of them",
    "--traceback": "show an error of the model's code whole",
}
PROBE_MEASURES = tuple(measure for measure in MEASURES if measure != "gradnorm")  # gradnorm needs a training step


def add_probe(commands) -> None:
    about = "measure what each layer contributes to the velocity, and what it stores of the teacher"
    probe = add_command(commands, "probe", about, "agrepa probe runs/demo-20261123-210000-3f9a2b --measures foga,cka")
    probe.add_argument(
        "--measures",
        type=_measures,
        metavar="M,M,…",
        help=f"of {', '.join(PROBE_MEASURES)}; the first of them in this order chooses the layers. Default: foga and "
        "the storage measures that the checkpoint allows",
    )
    probe.add_argument(
        "--recipe", default="corrected", choices=RECIPES, help="official: the released code's foga and lasp"
    )
    probe.add_argument("--model", metavar="MODULE:FACTORY", help="probe any model: FACTORY() returns (model, inputs)")
    probe.add_argument("--blocks", metavar="PATH", help="its blocks: transformer.blocks, or layers.*.attn,layers.*.ff")
    probe.add_argument(
        "--kind", default="block", choices=("block", "branch"), help="branch: attention and FFN of every block apart"
    )
    for name, about in MODEL_OPTIONS.items():
        options = {"nargs": "*"} if name == "--row-arguments" else {}
        probe.add_argument(name, metavar="NAME", help=f"with --model: {about}", **options)
    for name, about in MODEL_FLAGS.items():
        probe.add_argument(name, action="store_true", help=f"with --model: {about}")
    add_checkpoint(probe, nargs="?")  # --model stands in for it
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
        read_csv(out / "attribution.csv")  # what it cannot be appended to is refused before the work, too
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
