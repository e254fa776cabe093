"""The `agrepa` command: prepare, tokens, train, probe, sample, export, doctor."""

import argparse
import dataclasses
import sys
from pathlib import Path

from .config import DOMAINS, Config
from .config_file import load_config
from .errors import UserError, nearest
from .tokenizers.vq_config import VqFitConfig

SOURCES = {  # of `agrepa prepare`: what it is, and what its path is called
    "demo": ("fetch the demo corpus and prepare it", None),
    "folder": ("prepare a folder of wav, flac, mp3, ogg or opus files", "PATH"),
    "librispeech": ("prepare LibriSpeech, or one subset of it", "PATH"),
    "audioset": ("prepare AudioSet from its csv files (or one of them) and the audio below them", "PATH"),
    "webdataset": ("prepare WebDataset shards of audio: a folder, or a glob or braces in quotes", "PATTERN"),
    "hf": ("prepare a Hugging Face datasets folder: save_to_disk's, or parquet files", "PATH"),
}
PROBE_MEASURES = ("foga", "foga-vjp", "ridge", "cka", "lasp")


def main(argv: list[str] | None = None) -> None:
    """Run one command. Bad input prints one line and exits with code 2."""
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
    except UserError as error:
        print(f"agrepa {args.name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"agrepa {args.name}: interrupted", file=sys.stderr)
        sys.exit(130)


def _check_backend() -> None:
    from .kernels import active_backend

    try:
        active_backend()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agrepa", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    commands.add_parser("train", help="train, probe and align (all options: agrepa train --help)", add_help=False)

    prepare = commands.add_parser("prepare", help="recordings to shards, on one rank or under deepspeed or torchrun")
    prepare.add_argument("--verify", type=Path, metavar="PATH", help="read a folder of shards and check all of it")
    prepare.set_defaults(command=_prepare)
    kinds = prepare.add_subparsers(dest="kind", metavar="source")
    for name, (what, path) in SOURCES.items():
        kind = kinds.add_parser(name, help=what, description=what)
        if path:
            kind.add_argument("path", type=Path if path == "PATH" else str, metavar=path)
        if name in ("folder", "webdataset", "hf"):
            kind.add_argument("--domain", required=True, choices=DOMAINS)
        if name == "hf":
            kind.add_argument("--split", help="which one of a DatasetDict")
            for column in ("audio", "text", "label"):
                kind.add_argument(f"--{column}", metavar="COLUMN", help="default: found by its type or usual name")
        kind.add_argument("--preset", default="demo", help="whose features to compute (default: demo)")
        required = name != "demo"  # a default would put anybody's recordings where the demo's belong
        kind.add_argument("--out", required=required, help="folder of the shards (demo: data.path)")
        kind.add_argument(
            "--add-teacher", metavar="SPEC", help="add this teacher's targets to the shards that --out holds already"
        )
        kind.add_argument("overrides", nargs="*", metavar="data.field=value")

    tokens = commands.add_parser("tokens", help="tokenizers of one's own").add_subparsers(
        dest="kind", required=True, metavar="action"
    )
    fit = tokens.add_parser("fit", help="fit a RepCodec-style vector quantiser; data.*_tokens=vq:FILE then uses it")
    fit.add_argument("path", type=Path, help="folder of recordings")
    fit.add_argument(
        "--teacher", required=True, metavar="SPEC", help="whose frames, as data.speech_teacher: NAME@LAYER"
    )
    fit.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    for field in dataclasses.fields(VqFitConfig):
        if field.name != "teacher":
            name = f"--{field.name.replace('_', '-')}"
            kind = float if isinstance(field.default, float) else int
            fit.add_argument(name, type=kind, default=field.default, help=f"default: {field.default}")
    fit.set_defaults(command=_fit_tokens)

    probe = commands.add_parser("probe", help="measure what each layer contributes to the velocity, and what it stores")
    probe.add_argument(
        "--measures",
        type=_measures,
        metavar="M,M,…",
        help="foga, foga-vjp: what a layer contributes; ridge, cka, lasp: what it stores of the teacher. The first of "
        "them in this order chooses the layers. Default: foga, and what the checkpoint allows of ridge, cka and lasp",
    )
    probe.add_argument(
        "--recipe", default="corrected", choices=("corrected", "official"), help="official: the release's foga and lasp"
    )
    probe.add_argument("--model", metavar="MODULE:FACTORY", help="probe any model: FACTORY() returns (model, inputs)")
    probe.add_argument("--blocks", metavar="PATH", help="its blocks: transformer.blocks, or layers.*.attn,layers.*.ff")
    probe.add_argument(
        "--kind",
        default="block",
        choices=("block", "branch"),
        help="branch: the attention and FFN of every block apart; with --model, branches that are summed outside",
    )
    probe.add_argument(
        "--row-arguments",
        nargs="*",
        metavar="NAME",
        help="arguments of a block that have a row a clip: names, or places from 1 on",
    )
    probe.set_defaults(command=_probe)
    sample = commands.add_parser("sample", help="sample validation clips and write wavs")
    sample.add_argument("--clips", type=_positive, default=2, help="clips per domain (default: 2)")
    sample.set_defaults(command=_sample)
    for command in (probe, sample):
        optional = {"nargs": "?"} if command is probe else {}  # --model stands in for it
        command.add_argument(
            "checkpoint", type=Path, help="runs/<run>, one of its checkpoints, or an export", **optional
        )
        command.add_argument("--live", action="store_true", help="the live weights instead of their moving average")
        command.add_argument("--out", type=Path, help="where to write (default: beside the checkpoints of the run)")
        command.add_argument("overrides", nargs="*", metavar="section.field=value")

    export = commands.add_parser("export", help="the weights of a checkpoint as safetensors and yaml, for anybody")
    export.add_argument("checkpoint", type=Path, help="runs/<run>, or one of its checkpoints")
    export.add_argument("--live", action="store_true", help="the live weights instead of their moving average")
    export.add_argument("--out", type=Path, required=True, help="a new folder")
    export.set_defaults(command=_export)

    doctor = commands.add_parser("doctor", help="what is installed, which backend would run, what is missing")
    doctor.set_defaults(command=_doctor)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


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
    from .data.locations import writable
    from .prepare.pipeline import prepare
    from .prepare.sidecars import add_teacher

    config = load_config(args.preset, args.overrides)
    out = writable(args.out or config.data.path, "--out" if args.out else "data.path")

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
    from .tokenizers.vq_fit import fit_vq

    names = [field.name for field in dataclasses.fields(VqFitConfig)]
    fit_vq(args.path, VqFitConfig(**{name: getattr(args, name) for name in names}), args.out)


def _load(args: argparse.Namespace) -> tuple:
    """Model, its configuration with overrides, the shards, and the checkpoint's folder."""
    import torch

    from .checkpoints.weights import load_model, resolve_checkpoint
    from .data.index import matching_index

    path = resolve_checkpoint(args.checkpoint)
    model, saved = load_model(path, live=args.live)
    config: Config = load_config(path / "config.yaml", args.overrides)
    if config.model != saved.model:
        raise UserError("model.* is the checkpoint's: it cannot be overridden here")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), config, matching_index(config.data), path, device


def _probe(args: argparse.Namespace) -> None:
    if args.model:
        _probe_any(args)
        return
    if args.checkpoint is None:
        raise UserError("name a checkpoint, or --model MODULE:FACTORY with --blocks PATH")

    from .attribution.selection import select_as
    from .checkpoints.weights import load_projections, step_of
    from .probing.probe import measure_model

    model, config, index, path, device = _load(args)
    measures = args.measures
    if args.kind == "branch" and ((measures or ["foga"]) != ["foga"] or args.recipe != "corrected"):
        raise UserError("--kind branch: only foga in the corrected recipe measures parts of blocks")
    if args.recipe == "official" and (others := set(measures or ()) - {"foga", "lasp"}):
        raise UserError(f"--recipe official: the release measures foga and lasp, not {', '.join(sorted(others))}")
    try:
        measured = measure_model(
            model,
            index,
            config,
            device,
            step_of(path),
            measures=measures or (["foga"] if args.kind == "branch" else None),
            recipe=args.recipe,
            kind=args.kind,
            projections=load_projections(path),
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    out = args.out or _beside(path, "probe" if args.kind == "block" else "probe-branch")
    out.mkdir(parents=True, exist_ok=True)
    selection = None
    if args.kind == "block":
        try:
            selection = select_as(config.align, measured[0])
            selection.save(out / "selection.json")
        except ValueError as refusal:
            print(f"no ranking: {refusal}")
    _report_probe(measured, selection, out, config.align.k)


def _report_probe(measured: list, selection, out: Path, k: int) -> None:
    """The table, attribution.csv and plots of a probe."""
    from .attribution.csv import append_csv
    from .reporting.plots import plot_all
    from .reporting.tables import print_tables

    out.mkdir(parents=True, exist_ok=True)
    for scores in measured:
        append_csv(out / "attribution.csv", scores)
    plot_all(out / "attribution.csv", measured[0].evidence(), selection, out, k)
    print_tables(measured, selection)
    print(f"wrote {out}: attribution.csv and plots")


def _probe_any(args: argparse.Namespace) -> None:
    """FoG-A of a model that is not ours, at the inputs that its factory returns."""
    import importlib

    from .attribution.foga import ablate
    from .attribution.gates import find_blocks

    module, _, factory = args.model.partition(":")
    if not factory or args.blocks is None:
        raise UserError(f"--model {args.model}: write MODULE:FACTORY, and --blocks PATH beside it")
    if (args.measures or ["foga"]) != ["foga"] or args.recipe != "corrected":
        raise UserError("--model: only foga in the corrected recipe measures models that are not AudioDiT")
    sys.path.insert(0, "")
    try:
        model, inputs = getattr(importlib.import_module(module), factory)()
        blocks = find_blocks(model, args.blocks)
        places = args.row_arguments and [int(name) if name.isdigit() else name for name in args.row_arguments]
        scores = ablate(model, inputs, list(blocks.values()), kind=args.kind, row_arguments=places)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--model {args.model}: {error}") from error
    _report_probe([scores], None, args.out or Path("probe"), 3)
    print(f"L1 ... L{len(blocks)} are {', '.join(blocks)}")


def _sample(args: argparse.Namespace) -> None:
    from .audio.vocoder import load_vocoder
    from .reporting.samples import sample_clips, write_samples

    model, config, index, path, device = _load(args)
    vocoder = load_vocoder(config.eval.vocoder, config.data, "cpu")
    out = args.out or _beside(path, "sample")
    batch, sampled = sample_clips(model, index, config, args.clips, device, progress=True)
    names = write_samples(batch, sampled, index, vocoder, out, out / "mel.png")
    print(f"wrote {len(names)} wavs and mel.png to {out} (vocoder: {vocoder.name})")


def _beside(checkpoint: Path, what: str) -> Path:
    """runs/<run>/<what>-<tag>: not in the checkpoint's own folder, which the run may rotate away."""
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return run / f"{what}-{checkpoint.name}"


def _export(args: argparse.Namespace) -> None:
    from .checkpoints.weights import export, resolve_checkpoint, step_of

    path = resolve_checkpoint(args.checkpoint)
    export(path, args.out, live=args.live)
    print(f"wrote {args.out}: {'live' if args.live else 'averaged'} weights of step {step_of(path)}")


def _doctor(args: argparse.Namespace) -> None:
    from .doctor import report

    report()


if __name__ == "__main__":
    main()
