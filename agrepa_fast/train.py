"""The training program: `deepspeed agrepa_fast/train.py --ds_config zero2.json`, or `agrepa train`.

Warm up, measure every layer (FoG-A), choose the layers, align them, and show why they were chosen.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script, whose folder must not be searched: its `flow` or `data` would shadow others'
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import argparse
import os
import time
import traceback
from dataclasses import replace
from uuid import uuid4

import torch
import torch.distributed as dist

from agrepa_fast.alignment.aligner import Aligner
from agrepa_fast.attribution.csv import drop_later_probes
from agrepa_fast.audio.vocoder import load_vocoder
from agrepa_fast.checkpoints.find import find_checkpoint, resolve_checkpoint
from agrepa_fast.checkpoints.load import load_checkpoint
from agrepa_fast.checkpoints.save import Checkpoints
from agrepa_fast.checkpoints.weights import load_projections, load_weights, weights_file
from agrepa_fast.config import Config
from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.data.index import Index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.data.matching import matching_index
from agrepa_fast.data.plan import BatchPlan
from agrepa_fast.errors import LocalError, UserError
from agrepa_fast.files import FolderLock
from agrepa_fast.models.audio_dit.dit import AudioDiT
from agrepa_fast.probing.fixed_clips import FixedClips, storage_clips
from agrepa_fast.probing.schedule import LayerChoice
from agrepa_fast.ranks import on_rank_0
from agrepa_fast.reporting.summary import finish
from agrepa_fast.reporting.tracker import find_tracker, open_tracker
from agrepa_fast.training.builder import fit_to_shards
from agrepa_fast.training.captured_step import check_graphs
from agrepa_fast.training.dry_run import rehearse
from agrepa_fast.training.flops import peak_flops
from agrepa_fast.training.metrics import Metrics
from agrepa_fast.training.run import Run
from agrepa_fast.training.stop import StopRequest
from agrepa_fast.zero.construction import gathered, new_model
from agrepa_fast.zero.ds_config import find_ds_config, resolve_ds_config, zero_stage
from agrepa_fast.zero.ds_sections import adopt_sections
from agrepa_fast.zero.ema import Ema
from agrepa_fast.zero.engine import build_engine
from agrepa_fast.zero.process_group import join_process_group, set_collective_timeout


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="agrepa train",
        description=__doc__,
        epilog="example: deepspeed agrepa_fast/train.py --ds_config zero2.json train.steps=1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ds_config", default="zero2.json", help="a JSON file, or zero0.json … zero3.json of the package"
    )
    parser.add_argument("--preset", default="demo", help="a preset's name, or a yaml file")
    parser.add_argument(
        "--resume", metavar="latest|best|TAG", help="continue the run in run.dir (default: the newest in runs/)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_intermixed_args(argv)  # overrides may stand anywhere


def choose_config(args: argparse.Namespace) -> Config:
    """The preset with overrides, or on --resume the run's own configuration with overrides."""
    if args.resume is None:
        return load_config(args.preset, args.overrides)
    given = [o.partition("=")[2] for o in args.overrides if o.startswith("run.dir=")]
    if given:
        run = Path(given[-1])
    else:
        name = Path(args.preset).stem
        runs = sorted(Path("runs").glob(f"{name}-*/config.yaml"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(
                f"--resume {args.resume}: no run of preset {args.preset!r} in runs/; name it with run.dir=…"
            )
        run = runs[-1].parent
    if not (run / "config.yaml").is_file():
        raise UserError(f"--resume {args.resume}: {run} holds no run (no config.yaml)")
    find_checkpoint(run, args.resume, print if os.environ.get("RANK", "0") == "0" else lambda line: None)
    return load_config(run / "config.yaml", [*args.overrides, f"run.dir={run}"])


def prepared_index(config: Config) -> Index:
    """The shards of the run. The demo preset's own are made when they are missing; rank 0's refusal is everybody's."""
    demo = load_config("demo").data.path

    def prepare_and_check() -> None:
        if config.run.preset == "demo" and config.data.path == demo and not (Path(demo) / "index.json").is_file():
            from agrepa_fast.prepare.pipeline import prepare_demo

            prepare_demo(config, Path(demo))
        matching_index(config.data)

    on_rank_0(prepare_and_check)
    return matching_index(config.data)


def run_folder(config: Config, resume: bool, rank: int) -> tuple[Path, str]:
    """Create (or reopen) the run's folder; returns it and the run's id, the same on every rank."""
    name = config.run.dir or f"runs/{config.run.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    named = [name, config.run.id if resume else uuid4().hex]
    dist.broadcast_object_list(named)
    folder = Path(named[0])
    if not resume and (folder / "config.yaml").exists():
        raise UserError(
            f"run.dir={folder} already holds a run: continue it with --resume latest, or choose another folder"
        )
    dist.barrier()
    if rank == 0:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
    return folder, named[1]


def build_model(config: Config, index: Index, ds_config: dict, resume: bool) -> AudioDiT:
    """A new model, or one with the averaged weights of train.start_from; a resume brings its own."""
    torch.manual_seed(config.run.seed)
    model = new_model(config, ds_config)
    if config.train.start_from is not None and not resume:
        load_weights(model, weights_file(resolve_checkpoint(Path(config.train.start_from))), "this run's")
        return model
    code_mels = (torch.from_numpy(index.code_mels()) - index.mel_mean) / index.mel_std
    if config.model.token_dim >= index.n_mels:
        with gathered([model.tokens.embedding.weight]):
            model.tokens.start_from(code_mels)
    return model


def train(config: Config, ds_values: dict, resume: str | None) -> None:
    started = time.perf_counter()
    device = join_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    clips = config.train.batch_clips if config.train.batch_frames is None else None
    layout = BatchLayout(clips, config.train.accumulation, rank, world)
    ds_config = resolve_ds_config(ds_values, config.train, layout, device)
    check_graphs(config.train, device, zero_stage(ds_config))
    index = prepared_index(config)
    config = fit_to_shards(config, index)
    plan = BatchPlan.of(index, config, layout)
    ranks = {"rank": rank, "world": world, "center": config.align.center}
    # One shape of chunks where probes are CUDA graphs; under ZeRO-3 weights are there only inside a forward.
    graphs = config.probe.graph and device.type == "cuda" and zero_stage(ds_config) < 3
    chunk = config.probe.chunk
    probe_clips = FixedClips(index, "train", config.probe.clips, chunk, device, static=graphs, **ranks)
    stored_clips = storage_clips(index, config, device, rank, world)
    val_clips = FixedClips(index, "val", config.eval.clips, chunk, device, **ranks)
    vocoder = None

    def get_vocoder() -> None:  # before the first step: it may have to be fetched, and may not be had
        nonlocal vocoder
        vocoder = load_vocoder(config.eval.vocoder, config.data, "cpu")

    on_rank_0(get_vocoder)
    on_rank_0(lambda: find_tracker(config.train))
    model = build_model(config, index, ds_config, resume is not None)
    folder, identity = run_folder(config, resume is not None, rank)
    config = replace(config, run=replace(config.run, id=identity))
    lock = FolderLock(folder, "choose another run.dir")
    on_rank_0(lock.acquire)
    prepared = time.perf_counter()

    engine = build_engine(model, config, ds_config)
    set_collective_timeout(config.train.patience)
    ema = Ema(engine, config.train.ema_decay)
    teacher_dims = {domain: index.teacher(domain).dim for domain in index.domains}
    aligner = Aligner(config, teacher_dims, device)
    metrics = Metrics(folder, rank, world, peak_flops(config.train, device))
    own_folder = folder if rank == 0 else None
    choice = LayerChoice(config, engine.module, aligner, probe_clips, stored_clips, metrics.say, own_folder)
    checkpoints = Checkpoints(folder / "checkpoints", rank, world, config, index, metrics.say)
    checkpoints.remove_interrupted()
    first = 0
    if resume is not None:
        first = load_checkpoint(find_checkpoint(folder, resume), checkpoints, engine, ema, choice)
        if rank == 0:
            drop_later_probes(folder / "attribution.csv", first)
    else:
        if config.train.start_from is not None:
            aligner.start_from(load_projections(resolve_checkpoint(Path(config.train.start_from))))
        choice.start(index.domains)
    if rank == 0:  # not before a resume was accepted: the run's own configuration must survive a refusal
        save_config(replace(config, run=replace(config.run, dir=str(folder))), folder / "config.yaml")
    steps = config.train.steps
    metrics.open(steps, first, open_tracker(config, folder, rank))
    run = Run(config, index, device, engine, ema, choice, metrics, rank, world, folder)
    run.seconds["prepare"], run.seconds["build"] = prepared - started, time.perf_counter() - prepared
    for line in rehearse(engine, index, plan, layout, config.data.workers, device):
        metrics.say(line)
    reading = {"seed": config.run.seed, "center": config.align.center, "step": first}
    batches = TrainBatches(index, config.data, layout, **reading, plan=plan)

    if first == 0:
        checkpoints.score = run.validate(val_clips, 0)["val/flow_loss"]
    engine.module.train()
    loop_start, aside, stops = time.perf_counter(), sum(run.seconds.values()), False
    with StopRequest(device) as request:
        for step in range(first, steps):
            run.step(batches, step)
            done = step + 1
            if metrics.bar is not None:
                metrics.bar.update()
            stops = request.agreed() and done < steps
            saves = done % config.train.save_every == 0 or done == steps or stops
            if done % config.train.log_every == 0 or saves:
                run.log(done)
            if done % config.train.val_every == 0 or done == steps:
                checkpoints.score = run.validate(val_clips, done)["val/flow_loss"]
            choice.after_step(done, lambda: run.timed("probe"))
            if saves:
                with run.timed("checkpoint"):
                    run.guard.check_weights(done)
                    checkpoints.save(engine, ema, choice, done, must_succeed=done == steps or stops)
            if stops:
                break
    batches.close()
    run.seconds["train"] = time.perf_counter() - loop_start - (sum(run.seconds.values()) - aside)
    if stops:
        metrics.say(f"step {done}: stopped by a signal, saved; --resume latest run.dir={folder} goes on from here")
    else:
        finish(run, val_clips, vocoder, started)
    run.close()
    dist.barrier()
    dist.destroy_process_group()  # its threads, left to the interpreter's exit, now and then abort the process
    checkpoints.close()  # an upload may take longer than ranks wait for each other
    lock.release()


def main(argv: list[str] | None = None) -> None:
    """Train as the arguments say. Raises SystemExit: code 2 after an error that the user can put right, 1 after any
    other, 130 after an interrupt; each has printed its line."""
    args = parse(argv)
    try:
        config = choose_config(args)
        ds_values, settings, lines = adopt_sections(find_ds_config(args.ds_config), config.train, args.overrides)
        if os.environ.get("RANK", "0") == "0":
            for line in lines:
                print(line)
        train(replace(config, train=settings), ds_values, args.resume)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LocalError):
            print(f"agrepa train: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("agrepa train: interrupted; --resume latest goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        traceback.print_exc()
        print(f"agrepa train: rank {os.environ.get('RANK', 0)}: {explain(error)}", file=sys.stderr)
        raise SystemExit(1) from error


def explain(error: Exception) -> str:
    """Return one line about an error that no setting caused: which process ended, if the error says so."""
    text = " ".join(str(error).split())
    if text.startswith("DataLoader worker"):
        return (
            f"a loader process ended ({text}): memory that ran out is the usual reason, lower data.workers; "
            "--resume latest goes on from the last checkpoint"
        )
    if "gloo" in text or isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return (
            "another rank ended, or does not answer; its own output says why. --resume latest goes on from the last "
            "checkpoint"
        )
    return f"{type(error).__name__}: {text[:300]}"


def run_process(argv: list[str] | None = None) -> None:
    """`main` for a process that does nothing else. After a failure, end it at once: at a normal exit, Python waits for
    loader processes, and a process group that other ranks still wait in can abort and lose the exit code."""
    try:
        main(argv)
    except SystemExit as ending:
        if not dist.is_initialized():
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code)


if __name__ == "__main__":
    run_process()
