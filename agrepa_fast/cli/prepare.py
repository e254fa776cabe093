"""agrepa prepare and agrepa tokens."""

import argparse
import dataclasses

from ..config import DOMAINS
from ..config_file import check_used, load_config
from ..data_config import LoadingConfig
from ..errors import UserError
from ..files import check_writable
from ..settings import setting_names
from ..tokenizers.vq_config import VqFitConfig
from .arguments import a_location, a_path, add_command, add_overrides

SOURCES = {  # of `agrepa prepare`: the help, and the name of the path
    "demo": ("fetch the demo corpus and prepare it", None),
    "folder": ("prepare a folder of recordings: wav, flac, mp3, ogg, opus, m4a and more", "PATH"),
    "librispeech": ("prepare LibriSpeech, or one subset of it", "PATH"),
    "audioset": ("prepare AudioSet from its csv files (or one of them) and the audio below them", "PATH"),
    "webdataset": ("prepare WebDataset shards of audio: a folder, or a glob or braces in quotes", "PATTERN"),
    "hf": ("prepare a Hugging Face datasets folder: save_to_disk's, or parquet files", "PATH"),
}


def add_prepare(commands) -> None:
    example = "agrepa prepare folder ~/recordings --domain speech --out data/mine"
    about = "make shards of recordings, on one rank or several"
    prepare = add_command(commands, "prepare", about, example, "(source ... | --verify PATH)")
    prepare.add_argument(
        "--verify", type=a_location, metavar="PATH", help="read a folder of shards and check all of it"
    )
    prepare.set_defaults(command=_prepare)
    kinds = prepare.add_subparsers(dest="kind", metavar="source", prog=prepare.prog)
    for name, (about, path) in SOURCES.items():
        domain = "--domain speech " if name in ("folder", "webdataset", "hf") else ""
        needed = f"{path} {domain}--out data/mine " if path else ""
        usage = needed.replace("speech", "DOMAIN").replace("data/mine", "OUT")
        example = f"agrepa prepare {name} {needed or 'data.max_seconds=8'}".rstrip()
        kind = add_command(kinds, name, about, example, f"{usage}[options]")
        if path:
            kind.add_argument("path", type=a_path if path == "PATH" else a_location, metavar=path)
        if domain:
            kind.add_argument("--domain", required=True, choices=DOMAINS)
        if name == "hf":
            kind.add_argument("--split", help="of a DatasetDict")
            for column in ("audio", "text", "label"):
                kind.add_argument(f"--{column}", metavar="COLUMN", help="default: found by its type or usual name")
        kind.add_argument("--preset", default="demo", help="preset of the features (default: demo)")
        required = name != "demo"  # a default would put anybody's recordings where the demo's belong
        kind.add_argument("--out", required=required, type=a_location, help="folder of the shards (demo: data.path)")
        kind.add_argument("--add-teacher", metavar="SPEC", help="add this teacher's targets to the shards in --out")
        kind.add_argument("--add-speaker", metavar="SPEC", help="likewise, vectors of voices: campplus:FILE.onnx")
        add_overrides(kind, "data.field=value", "settings of the features, targets and shards")


def add_tokens(commands) -> None:
    example = "agrepa tokens fit wavs --teacher ~/hubert@9 --out data/vq.safetensors"
    tokens = add_command(commands, "tokens", "fit a tokenizer", example, "fit ...")
    kinds = tokens.add_subparsers(dest="kind", required=True, metavar="fit", prog=tokens.prog)
    about = "fit a RepCodec-style vector quantiser; data.*_tokens=vq:FILE then uses it"
    fit = add_command(kinds, "fit", about, example, "path --teacher SPEC --out FILE [options]")
    fit.add_argument("path", type=a_path, help="folder of recordings")
    fit.add_argument("--out", type=a_path, required=True, metavar="FILE", help="the .safetensors file to write")
    for field in dataclasses.fields(VqFitConfig):
        options = {"default": field.default}
        meaning = f"{field.metadata['meaning']} (default: {field.default})"
        if field.name == "teacher":
            options, meaning = {"required": True, "metavar": "SPEC"}, field.metadata["meaning"]
        fit.add_argument(f"--{field.name.replace('_', '-')}", help=meaning, **options)
    fit.set_defaults(command=_fit_tokens)


def _prepare(args: argparse.Namespace) -> None:
    from ..ranks import launched

    if (args.verify is None) == (args.kind is None):
        raise UserError("name a source of recordings (agrepa prepare --help lists them), or --verify PATH")
    with launched("agrepa prepare") as ranks:
        if args.verify is None:
            index = _prepared(args, ranks)
        else:
            from ..data.verifying import verify_folder

            index = verify_folder(args.verify, ranks)
        if ranks.rank == 0:
            counts = ", ".join(f"{d} {index.clips('train', d)} + {index.clips('val', d)}" for d in index.domains)
            print(f"{index.folder}: {counts} clips (training + validation){', no faults' if args.verify else ''}")


def _prepared(args: argparse.Namespace, ranks):
    from ..corpora.demo import demo_sources
    from ..data.index import INDEX
    from ..data.locations import writable
    from ..prepare.pipeline import prepare
    from ..prepare.sidecars import add_speaker, add_teacher

    config = load_config(args.preset, args.overrides)
    check_used(args.overrides, ("data",))
    for name in (override.partition("=")[0] for override in args.overrides):
        if name.removeprefix("data.") in setting_names(LoadingConfig) and (args.out or name != "data.path"):
            raise UserError(f"{name} has no effect here: shards are read by it, not made")
    setting = "--out" if args.out else "data.path"
    out = writable(args.out or config.data.path, setting)
    if not (out / INDEX).is_file():
        ranks.on_rank_0(lambda: check_writable(out, setting))

    def listing() -> list:
        return demo_sources(config.data) if args.kind == "demo" else [_source(args)]

    if None not in (args.add_teacher, args.add_speaker):
        raise UserError("--add-teacher and --add-speaker: add one after the other")
    if args.add_teacher is not None:
        return add_teacher(config, listing, out, args.add_teacher, ranks)
    if args.add_speaker is not None:
        return add_speaker(config, listing, out, args.add_speaker, ranks)
    return prepare(config, listing, out, ranks)


def _source(args: argparse.Namespace):
    from ..corpora.audioset import audioset_source
    from ..corpora.folder import folder_source
    from ..corpora.huggingface import hf_source
    from ..corpora.librispeech import librispeech_source
    from ..corpora.webdataset import webdataset_source

    if args.kind == "hf":
        columns = {"audio": args.audio, "text": args.text, "label": args.label}
        return hf_source(args.path, args.domain, split=args.split, **columns)
    if args.kind in ("librispeech", "audioset"):
        return {"librispeech": librispeech_source, "audioset": audioset_source}[args.kind](args.path)
    return {"folder": folder_source, "webdataset": webdataset_source}[args.kind](args.path, args.domain)


def _fit_tokens(args: argparse.Namespace) -> None:
    from ..prepare.fit_tokens import fit_tokens

    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder: name the .safetensors file to write")
    if not args.out.exists():
        check_writable(args.out.parent, "--out")
    config = VqFitConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(VqFitConfig)})
    fit_tokens(args.path, config, args.out)
