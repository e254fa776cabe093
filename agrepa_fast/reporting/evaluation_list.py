"""`agrepa evaluate RUN --list FILE`: the utterances of a published list, sampled from their prompts and measured."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..audio.vocoder import load_vocoder
from ..errors import UserError
from ..evaluation.lists import read_list
from ..evaluation.prompted import PromptedSynthesis
from ..evaluation.results import write_manifest
from ..files import FolderLock
from ..launch import local_device
from ..ranks import Ranks
from .evaluation import OF_SPEECH, USES, made_with
from .evaluation_folder import clip_of, listed_material, measure_material
from .opened import check_out, open_checkpoint


def evaluate_list(
    checkpoint: Path,
    overrides: Sequence[str],
    ranks: Ranks,
    *,
    live: bool,
    listed: Path,
    reference: Path | None,
    out: Path | None,
) -> None:
    """Run `agrepa evaluate RUN --list FILE`: sample each utterance of a list from its prompt, and measure it beside the
    true recording. The same command goes on after an interruption. Every rank must call it.

    listed, reference: see read_list; metrics.clips takes its first utterances. out: None for a folder beside the
    checkpoints. Raises UserError for a model that takes no text, and for a list that is not right or has no prompts.
    """
    opened = open_checkpoint(checkpoint, overrides, live=live, uses=USES)
    if (backbone := opened.config.model.backbone) != "f5":
        raise UserError(
            f"--list: model.backbone={backbone} is not sampled from texts, f5 is: give a folder of samples instead"
        )
    out = out or opened.beside(f"evaluate-{listed.stem}")
    ranks.on_rank_0(lambda: check_out(out))
    metrics = opened.config.metrics
    if not OF_SPEECH & set(metrics.only):
        raise UserError(
            f"--list: metrics.only={','.join(metrics.only)}: a list is measured by {', '.join(sorted(OF_SPEECH))}"
        )
    utterances = ranks.from_rank_0(lambda: read_list(listed, reference))[: metrics.clips]
    if any(utterance.prompt is None for utterance in utterances):
        raise UserError(f"--list {listed} has no prompts to sample from: give a folder of samples instead")
    vocoder = load_vocoder(opened.config.eval.vocoder, opened.config.data, str(local_device()))
    made = made_with(opened, vocoder, live) | {"list": str(listed), "reference": str(reference)}
    clips = [(clip_of(utterance, draw), utterance) for draw in range(metrics.draws) for utterance in utterances]
    lock = FolderLock(out, "choose another --out")
    ranks.on_rank_0(lock.acquire)
    try:
        synthesis = PromptedSynthesis(
            opened.model, opened.index, opened.config, vocoder, out / "wavs" / "sample", opened.device
        )
        material = listed_material(clips, synthesis.path)
        ranks.on_rank_0(lambda: write_manifest(material.clips, made, out / "manifest.json"))
        with tqdm(total=len(clips), desc="evaluate: wavs", unit="clip", disable=ranks.rank > 0) as bar:
            synthesis.run(clips, ranks, lambda count: bar.update(count * ranks.world))
        ranks.all_gather(None)
        measure_material(material, made, metrics, ranks, out, teachers=opened.index)
    finally:
        lock.release()
