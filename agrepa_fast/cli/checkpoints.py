"""agrepa sample, agrepa evaluate and agrepa export."""

import argparse

from ..config import DOMAINS
from ..errors import UserError
from .arguments import OVERRIDES, a_count, a_path, add_checkpoint, add_command


def add_sample(commands) -> None:
    example = "agrepa sample runs/mine --clips 4 flow.guidance=2"
    about = "sample validation clips and write wavs"
    sample = add_command(commands, "sample", about, example, f"[options] checkpoint {OVERRIDES}")
    sample.add_argument("--clips", type=a_count, default=2, help="clips per domain (default: 2)")
    add_checkpoint(sample)
    sample.set_defaults(command=_sample)


def add_evaluate(commands) -> None:
    about = "measure words, opinion, speaker and distances of samples"
    example = "agrepa evaluate runs/mine metrics.only=[wer,mmd,mel]"
    evaluate = add_command(commands, "evaluate", about, example, f"[options] checkpoint {OVERRIDES}")
    evaluate.add_argument("--domain", choices=DOMAINS, help="of a folder; of a run one domain alone (default: all)")
    evaluate.add_argument(
        "--reference",
        type=a_path,
        metavar="FOLDER",
        help="the true recordings of a folder's, by name; with --list those of the list",
    )
    evaluate.add_argument(
        "--list",
        type=a_path,
        metavar="FILE",
        help="texts of the samples: F5-TTS's or seed-tts-eval's list, or a folder of LibriSpeech",
    )
    add_checkpoint(evaluate, about="runs/<run>, a checkpoint, an export, or a folder of recordings")
    evaluate.set_defaults(command=_evaluate)


def add_export(commands) -> None:
    about = "write the weights of a checkpoint as safetensors and yaml"
    example = "agrepa export runs/mine --out exports/mine"
    export = add_command(commands, "export", about, example, "checkpoint --out PATH [options]")
    export.add_argument("checkpoint", type=a_path, help="runs/<run>, or one of its checkpoints")
    export.add_argument("--live", action="store_true", help="the live weights instead of their moving average")
    export.add_argument("--upstream", action="store_true", help="one file, as the package of the model reads it")
    export.add_argument("--out", type=a_path, required=True, help="a new folder; with --upstream a new file")
    export.set_defaults(command=_export)


def _sample(args: argparse.Namespace) -> None:
    from ..reporting.samples import sample_checkpoint

    sample_checkpoint(args.checkpoint, args.overrides, live=args.live, clips=args.clips, out=args.out)


def _evaluate(args: argparse.Namespace) -> None:
    from ..ranks import launched
    from ..reporting.evaluation import evaluate_checkpoint
    from ..reporting.evaluation_folder import evaluate_folder
    from ..reporting.evaluation_list import evaluate_list

    path = args.checkpoint
    if args.list is not None and args.domain == "audio":
        raise UserError(f"--domain audio: {args.list} is a list of speech")
    with launched("agrepa evaluate") as ranks:
        if not path.is_dir() or (path / "config.yaml").is_file() or path.parent.name == "checkpoints":
            if args.list is not None:
                options = {"live": args.live, "listed": args.list, "reference": args.reference, "out": args.out}
                evaluate_list(path, args.overrides, ranks, **options)
                return
            if args.reference is not None:
                raise UserError(f"--reference: {path} has its truths in the shards; it is for a folder of recordings")
            domains = args.domain and [args.domain]
            evaluate_checkpoint(path, args.overrides, ranks, live=args.live, domains=domains, out=args.out)
            return
        if args.live:
            raise UserError(f"--live: {path} is a folder of recordings, which has no weights")
        options = {"domain": args.domain, "reference": args.reference, "listed": args.list, "out": args.out}
        evaluate_folder(path, args.overrides, ranks, **options)


def _export(args: argparse.Namespace) -> None:
    from ..checkpoints.find import resolve_checkpoint, step_of
    from ..checkpoints.upstream import export_upstream
    from ..checkpoints.weights import export

    path = resolve_checkpoint(args.checkpoint)
    (export_upstream if args.upstream else export)(path, args.out, live=args.live)
    print(f"wrote {args.out}: {'live' if args.live else 'averaged'} weights of step {step_of(path)}")
