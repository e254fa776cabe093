"""Train audio flow-matching transformers whose alignment goes to the layers that cause the velocity."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from .config import DOMAINS, MEASURES, RECIPES
from .config_file import check_used, config_reference, config_yaml, load_config
from .errors import UserError, nearest, one_line, print_any_name
from .files import check_writable, local_path
from .tokenizers.vq_config import VqFitConfig

SOURCES = {  # of `agrepa prepare`: what it does, and what its path is called
    "demo": ("fetch the demo corpus and prepare it", None),
    "folder": ("prepare a folder of recordings: wav, flac, mp3, ogg, opus, m4a and more", "PATH"),
    "librispeech": ("prepare LibriSpeech, or one subset of it", "PATH"),
    "audioset": ("prepare AudioSet from its csv files (or one of them) and the audio below them", "PATH"),
    "webdataset": ("prepare WebDataset shards of audio: a folder, or a glob or braces in quotes", "PATTERN"),
    "hf": ("prepare a Hugging Face datasets folder: save_to_disk's, or parquet files", "PATH"),
}
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


def main(argv: list[str] | None = None) -> None:
    """Run one command. Bad input prints one line and exits with code 2, and so does a file that cannot be read or
    written."""
    print_any_name()
    # deepspeed's launcher passes the rank as an argument, too.
    argv = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank=")]
    if argv[:1] == ["train"]:  # train.py has its own arguments: it is also what the deepspeed launcher runs
        from .train import run_process

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
    """Drop what could not be written, on a full disk for one: Python would try again at exit, and fail."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_backend() -> None:
    from .kernels import active_backend

    try:
        active_backend()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agrepa", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    commands.add_parser("train", help="train, probe and align (options: agrepa train --help)", add_help=False)
    for add in (_add_prepare, _add_tokens, _add_probe, _add_sample, _add_export, _add_config, _add_doctor):
        add(commands)
    return parser


def _add(commands, name: str, about: str, example: str) -> argparse.ArgumentParser:
    """Add a command or an action. example: what a user types, shown below its options."""
    return commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_prepare(commands) -> None:
    example = "agrepa prepare folder ~/recordings --domain speech --out data/mine"
    prepare = _add(
        commands, "prepare", "make shards of recordings, on one rank or under deepspeed or torchrun", example
    )
    prepare.add_argument("--verify", type=_location, metavar="PATH", help="read a folder of shards and check all of it")
    prepare.set_defaults(command=_prepare)
    kinds = prepare.add_subparsers(dest="kind", metavar="source")
    for name, (about, path) in SOURCES.items():
        domain = " --domain speech" if name in ("folder", "webdataset", "hf") else ""
        where = "" if name == "demo" else f" {path}{domain} --out data/mine"
        kind = _add(kinds, name, about, f"agrepa prepare {name}{where} data.max_seconds=8")
        if path:
            kind.add_argument("path", type=_path if path == "PATH" else _location, metavar=path)
        if domain:
            kind.add_argument("--domain", required=True, choices=DOMAINS)
        if name == "hf":
            kind.add_argument("--split", help="of a DatasetDict")
            for column in ("audio", "text", "label"):
                kind.add_argument(f"--{column}", metavar="COLUMN", help="default: found by its type or usual name")
        kind.add_argument("--preset", default="demo", help="preset of the features (default: demo)")
        required = name != "demo"  # a default would put anybody's recordings where the demo's belong
        kind.add_argument("--out", required=required, type=_location, help="folder of the shards (demo: data.path)")
        kind.add_argument("--add-teacher", metavar="SPEC", help="add this teacher's targets to the shards in --out")
        kind.add_argument("overrides", nargs="*", metavar="data.field=value")


def _add_tokens(commands) -> None:
    tokens = commands.add_parser("tokens", help="fit a tokenizer").add_subparsers(
        dest="kind", required=True, metavar="action"
    )
    about = "fit a RepCodec-style vector quantiser; data.*_tokens=vq:FILE then uses it"
    example = "agrepa tokens fit ~/recordings --teacher package:whisper-base --out data/tokens.safetensors"
    fit = _add(tokens, "fit", about, example)
    fit.add_argument("path", type=_path, help="folder of recordings")
    fit.add_argument("--out", type=_path, required=True, metavar="FILE", help="the .safetensors file to write")
    for field in dataclasses.fields(VqFitConfig):
        options = {"default": field.default}
        meaning = f"{field.metadata['meaning']} (default: {field.default})"
        if field.name == "teacher":
            options, meaning = {"required": True, "metavar": "SPEC"}, field.metadata["meaning"]
        fit.add_argument(f"--{field.name.replace('_', '-')}", help=meaning, **options)
    fit.set_defaults(command=_fit_tokens)


def _add_probe(commands) -> None:
    about = "measure what each layer contributes to the velocity, and what it stores of the teacher"
    probe = _add(commands, "probe", about, "agrepa probe runs/demo-20261123-210000-3f9a2b --measures foga,cka")
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
    _add_checkpoint(probe, nargs="?")  # --model stands in for it
    probe.set_defaults(command=_probe)


def _add_sample(commands) -> None:
    example = "agrepa sample runs/demo-20261123-210000-3f9a2b --clips 4 flow.guidance=2"
    sample = _add(commands, "sample", "sample validation clips and write wavs", example)
    sample.add_argument("--clips", type=_positive, default=2, help="clips per domain (default: 2)")
    _add_checkpoint(sample)
    sample.set_defaults(command=_sample)


def _add_checkpoint(command: argparse.ArgumentParser, **options) -> None:
    command.add_argument("checkpoint", type=_path, help="runs/<run>, one of its checkpoints, or an export", **options)
    command.add_argument("--live", action="store_true", help="the live weights instead of their moving average")
    command.add_argument("--out", type=_path, help="folder to write to (default: beside the run's checkpoints)")
    command.add_argument("overrides", nargs="*", metavar="section.field=value")


def _add_export(commands) -> None:
    about = "write the weights of a checkpoint as safetensors and yaml"
    export = _add(commands, "export", about, "agrepa export runs/demo-20261123-210000-3f9a2b --out exports/demo")
    export.add_argument("checkpoint", type=_path, help="runs/<run>, or one of its checkpoints")
    export.add_argument("--live", action="store_true", help="the live weights instead of their moving average")
    export.add_argument("--upstream", action="store_true", help="one file, as the package of the model reads it")
    export.add_argument("--out", type=_path, required=True, help="a new folder; with --upstream a new file")
    export.set_defaults(command=_export)


def _add_config(commands) -> None:
    about = "print the resolved configuration of a preset, a yaml file or a run"
    config = _add(commands, "config", about, "agrepa config agrepa-a train.batch_clips=256 > mine.yaml")
    config.add_argument(
        "preset", nargs="?", default="demo", help="a preset, a yaml file or a run's folder (default: demo)"
    )
    config.add_argument("--reference", action="store_true", help="print every setting and its meaning, as markdown")
    config.add_argument("overrides", nargs="*", metavar="section.field=value")
    config.set_defaults(command=_config)


def _add_doctor(commands) -> None:
    about = "say what is installed, which backend would run and what is missing"
    _add(commands, "doctor", about, "agrepa doctor").set_defaults(command=_doctor)


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number from 1 to 999999999")
    return int(text)


def _path(text: str) -> Path:
    return Path(_location(text))


def _location(text: str) -> str:
    """Return a path or a URL, with ~ for the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: a path is wanted")
    try:
        return str(local_path(text)) if text.startswith("~") else text
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _measures(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PROBE_MEASURES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: {nearest(unknown[0], PROBE_MEASURES)}")
    return sorted(names, key=PROBE_MEASURES.index)


def _prepare(args: argparse.Namespace) -> None:
    from .ranks import launched

    if (args.verify is None) == (args.kind is None):
        raise UserError("name a source of recordings (agrepa prepare --help lists them), or --verify PATH")
    with launched("agrepa prepare") as ranks:
        if args.verify is None:
            index = _prepared(args, ranks)
        else:
            from .data.verifying import verify_folder

            index = verify_folder(args.verify, ranks)
        if ranks.rank == 0:
            counts = ", ".join(f"{d} {index.clips('train', d)} + {index.clips('val', d)}" for d in index.domains)
            print(f"{index.folder}: {counts} clips (training + validation){', no faults' if args.verify else ''}")


def _prepared(args: argparse.Namespace, ranks):
    from .corpora.demo import demo_sources
    from .data.index import INDEX
    from .data.locations import writable
    from .prepare.pipeline import prepare
    from .prepare.sidecars import add_teacher

    config = load_config(args.preset, args.overrides)
    check_used(args.overrides, ("data",))
    setting = "--out" if args.out else "data.path"
    out = writable(args.out or config.data.path, setting)
    if not (out / INDEX).is_file():
        ranks.on_rank_0(lambda: check_writable(out, setting))

    def listing() -> list:
        return demo_sources(config.data) if args.kind == "demo" else [_source(args)]

    if args.add_teacher is not None:
        return add_teacher(config, listing, out, args.add_teacher, ranks)
    return prepare(config, listing, out, ranks)


def _source(args: argparse.Namespace):
    from .corpora.audioset import audioset_source
    from .corpora.folder import folder_source
    from .corpora.huggingface import hf_source
    from .corpora.librispeech import librispeech_source
    from .corpora.webdataset import webdataset_source

    if args.kind == "hf":
        columns = {"audio": args.audio, "text": args.text, "label": args.label}
        return hf_source(args.path, args.domain, split=args.split, **columns)
    if args.kind in ("librispeech", "audioset"):
        return {"librispeech": librispeech_source, "audioset": audioset_source}[args.kind](args.path)
    return {"folder": folder_source, "webdataset": webdataset_source}[args.kind](args.path, args.domain)


def _fit_tokens(args: argparse.Namespace) -> None:
    from .prepare.fit_tokens import fit_tokens

    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder: name the .safetensors file to write")
    if not args.out.exists():
        check_writable(args.out.parent, "--out")
    config = VqFitConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(VqFitConfig)})
    fit_tokens(args.path, config, args.out)


def _probe(args: argparse.Namespace) -> None:
    from .attribution.csv import read_csv

    if args.out is not None or args.model is not None:
        out = args.out or Path("probe")
        check_writable(out, "--out")
        read_csv(out / "attribution.csv")  # what it cannot be appended to is refused before the work, too
    from .probing.measure import ProbeRequest
    from .reporting.probe import probe_checkpoint

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
    from .reporting.any_model import ModelRequest, probe_any_model

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


def _sample(args: argparse.Namespace) -> None:
    from .reporting.samples import sample_checkpoint

    sample_checkpoint(args.checkpoint, args.overrides, live=args.live, clips=args.clips, out=args.out)


def _export(args: argparse.Namespace) -> None:
    from .checkpoints.find import resolve_checkpoint, step_of
    from .checkpoints.upstream import export_upstream
    from .checkpoints.weights import export

    path = resolve_checkpoint(args.checkpoint)
    (export_upstream if args.upstream else export)(path, args.out, live=args.live)
    print(f"wrote {args.out}: {'live' if args.live else 'averaged'} weights of step {step_of(path)}")


def _config(args: argparse.Namespace) -> None:
    if "=" in args.preset:  # overrides of the default preset
        args.preset, args.overrides = "demo", [args.preset, *args.overrides]
    saved = local_path(args.preset) / "config.yaml"
    text = config_yaml(load_config(saved if saved.is_file() else args.preset, args.overrides))
    print(config_reference() if args.reference else text, end="")


def _doctor(args: argparse.Namespace) -> None:
    from .doctor import report

    report()


if __name__ == "__main__":
    main()
