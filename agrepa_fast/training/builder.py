"""Build a run from its settings, shards and checkpoint: everything that can refuse it first, then the engine and the
parts beside it, then its files."""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..alignment.aligner import Aligner
from ..alignment.registry import check_backbone, check_layers, check_shards, make_objective
from ..attribution.csv import drop_later_probes
from ..attribution.selection import LayerSelection
from ..audio.vocoder import Vocoder, load_vocoder
from ..checkpoints.load import load_checkpoint
from ..checkpoints.save import Checkpoints
from ..checkpoints.upstream import is_upstream_file, other_settings, start_from_upstream
from ..checkpoints.weights import load_projections, load_weights, weights_file
from ..config import Config
from ..config_file import load_config, save_config
from ..data.index import Index, load_index
from ..data.layout import BatchLayout
from ..data.loading import TrainBatches
from ..data.matching import count_transcribed, matching_index
from ..data.plan import BatchPlan
from ..data.text import load_text
from ..errors import UserError
from ..files import FolderLock, check_readable
from ..models.backbone import Backbone
from ..probing.fixed_clips import FixedClips, probe_clips, storage_clips, validation_clips
from ..probing.schedule import LayerChoice
from ..ranks import agreeing, all_gather, from_rank_0, on_rank_0, raising_alike
from ..seeds import derive_seed
from ..zero.construction import gathered, new_model
from ..zero.ds_config import resolve_ds_config, zero_stage
from ..zero.ema import Ema
from ..zero.engine import build_engine
from ..zero.process_group import check_backend, join_process_group, set_collective_timeout
from ..zero.refusals import check_ds_config
from .captured_step import check_graphs, count_shapes
from .context import RunContext
from .dry_run import dry_run
from .flops import forward_flops, peak_flops
from .folder import locate_run, open_folder, set_attempt_aside
from .metrics import Metrics
from .precision import choose_precision
from .run import Run
from .start import check_start, fix_start, keep_start, own_generation, start_masters
from .tracker import check_tracker, open_tracker

DEMOS = ("demo", "demo-f5", "demo-long")  # presets on the demo corpus
DEMO_MINUTES = 12 * 60.0  # that ranks wait while rank 0 prepares it


@dataclass
class Training:
    """A run that is ready for its next step, and the objects that its loop needs."""

    run: Run
    batches: TrainBatches
    checkpoints: Checkpoints
    validation_clips: FixedClips
    vocoder: Vocoder | None  # on rank 0
    first_step: int
    lock: FolderLock  # of the run's folder, held by rank 0

    def validate(self, step: int) -> None:
        """Measure the validation losses; checkpoints are ranked by the newest. Every rank must call it."""
        self.checkpoints.score = self.run.validate(self.validation_clips, step)

    def close(self) -> None:
        """Finish the files of the run and leave the process group. Every rank must call it."""
        with agreeing():
            self.run.close()
        dist.destroy_process_group()  # its threads, left to the interpreter's exit, now and then abort the process
        self.checkpoints.close()  # an upload may take longer than ranks wait for each other
        self.lock.release()


def build(config: Config, ds_values: dict, resume: str | None) -> Training:
    """Return a run on the ranks of the launcher, from its beginning or from a checkpoint. Every rank must call it.

    ds_values: the content of the --ds_config file. resume: latest, best or a checkpoint's tag. Raises UserError if the
    settings do not fit each other, the machine, the shards or the checkpoint; a new run has then left at most its
    lock and an empty folder, and the records of an earlier attempt or of a resumed run are as they were. An error of
    one rank is raised on all, except where DeepSpeed's collectives run: while it makes its engine, while it loads one
    at stage 3 or of other ranks, and in the dry run, unless memory ran out below stage 3.
    """
    started = time.perf_counter()
    device = join_process_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    set_collective_timeout(config.train.patience)
    with agreeing():
        check_backend()
        config, checkpoint = locate_run(config, resume)
        config = fix_start(config) if checkpoint is None else keep_start(config, checkpoint)
        config, precision_line = choose_precision(config, ds_values, device, checkpoint)
        fixed_clips_per_step = config.train.batch_clips if config.train.batch_frames is None else None
        layout = BatchLayout(fixed_clips_per_step, config.train.accumulation, rank, world)
        ds_config = resolve_ds_config(ds_values, config.train, layout, device)
        check_ds_config(ds_config)
        check_graphs(config.train, device, zero_stage(ds_config))
        on_rank_0(lambda: check_tracker(config.train))
        index = prepared_index(config)
        config = fit_to_shards(config, index)
        generation = from_rank_0(lambda: own_generation(config, checkpoint))
        context = RunContext(config, index, device, rank, world, Path(config.run.dir), generation)
        clips = make_fixed_clips(context, partitioned=zero_stage(ds_config) == 3)
        vocoder = load_vocoder_on_rank_0(config)
        model = build_model(config, index, ds_config, checkpoint is not None)
        plan = BatchPlan.of(index, config, layout, model.attention_cost, context.draws_seed)
        metrics = Metrics(context.folder, rank, world, peak_flops(config.train, device))
        where = context.folder / "checkpoints", rank, world
        checkpoints = Checkpoints(*where, config, index, metrics.print, generation=generation)
        lock = open_folder(context.folder, new=checkpoint is None)

    prepared = time.perf_counter()
    with raising_alike():
        engine = build_engine(model, config, ds_config)
        if checkpoint is None and config.train.start_from is not None:
            start_masters(engine, Path(config.train.start_from))
        aligner = Aligner(config, model, teacher_dims(index), device, metrics.print)  # the model has its dtype now
    ema = Ema(engine, config.train.ema_decay)
    own_folder = context.folder if rank == 0 else None
    choice = LayerChoice(config, engine.module, aligner, clips.probe, clips.storage, metrics.print, own_folder)
    checkpoints.remove_interrupted()
    with agreeing():
        if checkpoint is None:
            first_step = 0
            begin(context, choice)
        else:
            first_step = load_checkpoint(checkpoint, checkpoints, engine, ema, choice)
    with raising_alike():
        lines = lines_before_the_first_step(engine, context, plan, layout, aligner)
    with agreeing():  # from here on the run writes
        tracker = open_tracker(context)  # it may still refuse
        if rank == 0:
            if checkpoint is None:
                set_attempt_aside(context.folder)
            drop_later_probes(context.folder / "attribution.csv", first_step)
            _keep_choice(context.folder / "selection.json", aligner.selection)
            save_config(config, context.folder / "config.yaml")
        metrics.open(config.train.steps, first_step, tracker)
        checkpoints.continue_copy()
    replayable = model.replayable and aligner.objective.replayable
    shapes = count_shapes(replayable, config.train, device, zero_stage(ds_config), plan, layout)
    run = Run(context, engine, ema, choice, metrics, started, auto_graphs=shapes)
    run.seconds |= {"prepare": prepared - started, "build": time.perf_counter() - prepared}
    for line in (*filter(None, [precision_line]), *lines):
        metrics.print(line)
    reading = {"seed": context.draws_seed, "center": config.align.center, "step": first_step}
    targets = {"teacher_frames": aligner.objective.target == "frames", "attention": aligner.objective.attention}
    batches = TrainBatches(index, config.data, layout, **reading, plan=plan, **targets)
    return Training(run, batches, checkpoints, clips.validation, vocoder, first_step, lock)


def prepared_index(config: Config) -> Index:
    """Return the index of the run's shards. The demo's are made if they are missing, for its own presets. Raises
    UserError if the shards do not match data.*, or if this rank does not see them. Every rank must call it."""
    preset, folder = config.run.preset, Path(config.data.path)
    makes_shards = preset in DEMOS and config.data.path == load_config(preset).data.path

    def prepare_and_check() -> Index:
        load_text(config.data.text)  # may be missing, which the demo's preparation would show after minutes
        if makes_shards and not (folder / "index.json").is_file():
            from ..prepare.pipeline import prepare_demo

            prepare_demo(config, folder)
        return matching_index(config.data)

    if makes_shards:
        set_collective_timeout(DEMO_MINUTES)
    index = from_rank_0(prepare_and_check)
    set_collective_timeout(config.train.patience)
    load_index(index.folder, verify=False)  # on every rank: each may see other files
    return index


def fit_to_shards(config: Config, index: Index) -> Config:
    """Return the settings with the sizes that the shards decide. Raises UserError if the run asks for others."""
    for name, value in (("n_mels", index.n_mels), ("vocab", index.vocab)):
        if getattr(config.model, name) not in (None, value):
            raise UserError(
                f"model.{name}={getattr(config.model, name)}, but the shards in {index.folder} have {value}"
            )
    text = None if index.text is None else index.text.size
    if config.model.text_vocab not in (None, text):
        have = "data.text is null" if text is None else f"data.text={config.data.text} has {text} ids"
        raise UserError(f"model.text_vocab={config.model.text_vocab}, but {have}: leave model.text_vocab out")
    if config.model.speaker_dim not in (None, index.speaker_dim):
        have = "no speaker vectors" if index.speaker_dim is None else f"speaker vectors of {index.speaker_dim} channels"
        raise UserError(
            f"model.speaker_dim={config.model.speaker_dim}, but the shards in {index.folder} have {have}: leave "
            "model.speaker_dim out"
        )
    if config.model.extra_vocab not in (None, index.extra_vocab):
        have = "no second tokens" if index.extra_vocab is None else f"{index.extra_vocab} of them"
        raise UserError(
            f"model.extra_vocab={config.model.extra_vocab}, but the shards in {index.folder} have {have}: "
            f"set model.extra_vocab={'null' if index.extra_vocab is None else index.extra_vocab}"
        )
    sizes = {"n_mels": index.n_mels, "vocab": index.vocab, "text_vocab": text, "speaker_dim": index.speaker_dim}
    return replace(config, model=replace(config.model, **sizes))


class FixedSets(NamedTuple):
    """The clips that probes, storage measures and validation use at every step."""

    probe: FixedClips
    storage: FixedClips
    validation: FixedClips


def make_fixed_clips(context: RunContext, partitioned: bool) -> FixedSets:
    """Return the fixed clips of this rank. partitioned: ZeRO-3, where a probe cannot be a CUDA graph, because weights
    exist only inside a forward."""
    config = context.config
    graphs = config.probe.graph and context.device.type == "cuda" and not partitioned
    place = {"device": context.device, "rank": context.rank, "world": context.world}
    return FixedSets(
        probe_clips(context.index, config, **place, one_shape=graphs),
        storage_clips(context.index, config, **place),
        validation_clips(context.index, config, **place),
    )


def load_vocoder_on_rank_0(config: Config) -> Vocoder | None:
    """Return the vocoder on rank 0, and None elsewhere. It is loaded before the first step: it may have to be fetched,
    and then every rank raises UserError if it cannot be had."""
    loaded = []

    def load() -> None:
        loaded.append(load_vocoder(config.eval.vocoder, config.data, "cpu"))

    on_rank_0(load)
    return loaded[0] if loaded else None


def build_model(config: Config, index: Index, ds_config: dict, resume: bool) -> Backbone:
    """Return a new model, with the weights of train.start_from if that is set: averaged ones of a checkpoint or an
    export, or a file's. resume: a checkpoint will replace all weights."""

    def measure(whole: Backbone) -> None:
        if config.train.batch_frames is not None:
            whole.attention_cost = forward_flops(whole, index, torch.device("cpu")).attention_cost
        all_gather(None)  # ZeRO-3 spreads the model next: every rank must have made it

    torch.manual_seed(config.run.seed)
    model = new_model(config, ds_config, measure)
    check_together(config, model, index)
    start_from = None if resume or config.train.start_from is None else Path(config.train.start_from)
    if start_from is None:
        code_mels = (torch.from_numpy(index.code_mels()) - index.mel_mean) / index.mel_std
    elif is_upstream_file(start_from):
        check_readable(start_from)
    else:
        weights_file(start_from)
        warning = check_start(config, model, index, start_from)
    all_gather(None)  # ZeRO-3 gathers weights next, and would wait for a rank that lacks a file
    if start_from is None:
        model.start_from_codes(code_mels, gathered)
    else:
        if is_upstream_file(start_from):
            line, warning = start_from_upstream(model, start_from), other_settings(model, config)
            if dist.get_rank() == 0:
                print(line)
        else:
            load_weights(model, weights_file(start_from), "this run's")
        if warning is not None and dist.get_rank() == 0:
            print(warning, file=sys.stderr)
    return model


def check_together(config: Config, model: Backbone, index: Index) -> None:
    """Raise UserError if the shards' text, the layers' choice or the objective do not go with the model or the shards.
    The table of docs/objectives.md comes from this and the checks of settings."""
    if index.text is not None and "text" not in model.needs:
        raise UserError(
            f"data.text={index.text.spec}, but model.backbone={config.model.backbone} takes no text: set data.text=null"
        )
    widths = [layer.width for layer in model.layers]
    config.check_layers(widths, model.condition_width)
    objective = make_objective(config.align.objective, widths, teacher_dims(index))
    check_backbone(config.align, objective, config.model.backbone, type(model))
    check_layers(config.align, objective, widths)
    check_shards(config.align, objective, index)


def teacher_dims(index: Index) -> dict[str, int]:
    """Return domain -> width of its teacher's vectors."""
    return {domain: index.teacher(domain).dim for domain in index.domains}


def _keep_choice(file: Path, selection: LayerSelection | None) -> None:
    """Write the layers that a run aligns from its first step on. Those of an attempt that had chosen already go."""
    if selection is None:
        file.unlink(missing_ok=True)
    else:
        selection.save(file)


def begin(context: RunContext, choice: LayerChoice) -> None:
    """Make the heads and projections of a run that starts at step 0, and give every rank dropout masks of its own."""
    start_from = context.config.train.start_from
    if start_from is not None and not is_upstream_file(Path(start_from)):
        choice.aligner.start_from(load_projections(Path(start_from)))
    choice.start(context.index.domains)
    torch.manual_seed(derive_seed(context.draws_seed, 0, context.rank))


def lines_before_the_first_step(
    engine, context: RunContext, plan: BatchPlan, layout: BatchLayout, aligner: Aligner
) -> list[str]:
    """Return lines about the batches, the last of them after a dry run of the largest. Every rank must call it.

    A CPU without length buckets has no dry run: its batches are as long as their clips, and no error reports that
    memory ran out.
    """
    lines = [] if context.index.text is None else [count_transcribed(context.index)]
    if plan.fixed_shapes:
        lines.append(plan.describe())
    if crowded := plan.crowding(layout, context.config.data.workers):
        lines.append(crowded)
    if plan.fixed_shapes or context.device.type == "cuda":
        lines.append(dry_run(engine, context.index, plan, layout, context.device, aligner))
    return lines
