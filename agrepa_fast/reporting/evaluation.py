"""`agrepa evaluate`: rows of wavs from a checkpoint, measured, in files and as a table."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..audio.vocoder import Vocoder, load_vocoder
from ..checkpoints.find import step_of
from ..checkpoints.weights import weights_file
from ..data.index import Index
from ..data.reading import fixed_clips
from ..errors import UserError
from ..evaluation.evaluate import Figures, Judges, similarities, word_figures
from ..evaluation.manifest import Clip, clips_of, evaluated_samples
from ..evaluation.results import clip_rows, summarise, write_clips, write_embeddings, write_manifest
from ..evaluation.synthesis import Synthesis, Wav
from ..files import FolderLock, file_sha256, write_atomically
from ..launch import local_device
from ..ranks import Ranks
from .evaluation_table import print_results, results_markdown
from .opened import SAMPLING, OpenedCheckpoint, check_out, open_checkpoint
from .report import write_report

_DRAWN_IN_TRAINING = ("times", "average", "drop_tokens", "drop_reference", "drop_all")  # of flow: no sample knows them
USES = ("data", *SAMPLING, "eval.vocoder", "metrics")
OF_SPEECH = {"wer", "mos", "similarity"}  # metrics that need no shards


def evaluate_checkpoint(
    checkpoint: Path,
    overrides: Sequence[str],
    ranks: Ranks,
    *,
    live: bool,
    domains: Sequence[str] | None,
    out: Path | None,
) -> None:
    """Run `agrepa evaluate`: sample all validation clips of a checkpoint, and measure them beside their truths and the
    mean mels of their tokens. The same command goes on after an interruption. Every rank must call it.

    domains: those to evaluate; None for all of the shards. out: None for a folder beside the checkpoints. Raises
    UserError for settings, shards or a folder that do not fit.
    """
    opened = open_checkpoint(checkpoint, overrides, live=live, uses=USES)
    out = out or opened.beside("evaluate")
    ranks.on_rank_0(lambda: check_out(out))
    metrics, index = opened.config.metrics, opened.index
    domains = _domains(index, domains)
    samples = evaluated_samples(index, metrics, domains)
    clips = clips_of(samples, metrics.draws)
    _check_measurable(clips, index, metrics.only)
    vocoder = load_vocoder(opened.config.eval.vocoder, opened.config.data, str(local_device()))
    lock = FolderLock(out, "choose another --out")
    ranks.on_rank_0(lock.acquire)
    try:
        made = made_with(opened, vocoder, live)
        manifest = ranks.from_rank_0(lambda: write_manifest(clips, made, out / "manifest.json"))
        wavs = _synthesize(opened, vocoder, samples, clips, out / "wavs", ranks)
        judges = Judges(metrics, ranks)
        per_frame = index.features["hop_length"] / index.features["sample_rate"]

        def reference(domain: str) -> np.ndarray:
            return _reference(judges, index, domain, vocoder)

        measured = measure(judges, wavs, lambda wav: wav.clip.frames * per_frame, reference, out)
        facts = {"manifest": manifest, **made, **measured, "circular": circular_models(judges.models, index)}
        ranks.on_rank_0(lambda: write_results(facts, len(wavs), out))
    finally:
        lock.release()


def _domains(index: Index, wanted: Sequence[str] | None) -> list[str]:
    if wanted and (missing := [domain for domain in wanted if domain not in index.domains]):
        raise UserError(f"--domain {missing[0]}: the shards in {index.folder} have {' and '.join(index.domains)}")
    return [domain for domain in index.domains if not wanted or domain in wanted]


def _check_measurable(clips: Sequence[Clip], index: Index, only: Sequence[str]) -> None:
    """Raise UserError, before anything is sampled, if no metric applies to the clips, or if distances have no
    reference."""
    domains = dict.fromkeys(clip.domain for clip in clips)
    if "speech" not in domains and OF_SPEECH.issuperset(only):
        raise UserError(f"metrics.only={','.join(only)}: {' and '.join(domains)} is measured by mmd, fad and mel")
    if {"mmd", "fad"} & set(only) and (few := [domain for domain in domains if index.clips("train", domain) < 2]):
        raise UserError(
            f"{index.folder} has fewer than two {few[0]} clips for training, which mmd and fad compare with: prepare "
            "more recordings, or measure something else (metrics.only)"
        )


def made_with(opened: OpenedCheckpoint, vocoder: Vocoder, live: bool) -> dict:
    """Return the settings, weights and versions that the wavs depend on, besides the clips."""
    flow = opened.config.flow
    return {
        "weights": file_sha256(weights_file(opened.path, live)),
        "step": step_of(opened.path),
        "averaged": not live,
        "vocoder": vocoder.name,
        "flow": {name: value for name, value in asdict(flow).items() if name not in _DRAWN_IN_TRAINING},
    }


def _synthesize(
    opened: OpenedCheckpoint, vocoder: Vocoder, samples: Sequence, clips: Sequence[Clip], folder: Path, ranks: Ranks
) -> list[Wav]:
    flow = opened.config.flow
    synthesis = Synthesis(opened.model, opened.index, flow, vocoder, folder, opened.device)
    with tqdm(total=len(clips), desc="evaluate: wavs", unit="clip", disable=ranks.rank > 0) as bar:
        synthesis.run(clips, samples, ranks, lambda count: bar.update(count * ranks.world))
    ranks.all_gather(None)
    return synthesis.wavs(clips)


def _reference(judges: Judges, index: Index, domain: str, vocoder: Vocoder) -> np.ndarray:
    """Return the embeddings of training clips, which MMD and FAD compare with: never of the evaluated ones."""
    count = min(judges.metrics.reference_clips, index.clips("train", domain))
    return judges.reference(domain, fixed_clips(index, "train", domain, count), vocoder)


def measure(
    judges: Judges,
    wavs: Sequence[Wav],
    seconds: Callable[[Wav], float],
    reference: Callable[[str], np.ndarray] | None,
    out: Path,
) -> dict:
    """Return the part of results.json that the metric models give, and write clips.csv and embeddings.npz on rank 0.

    seconds(wav): its length. reference(domain): the embeddings (clips, dim) that sets are compared with; None if there
    are none, and no distances then.
    """
    metrics, speech = judges.metrics, [wav for wav in wavs if wav.clip.domain == "speech"]
    figures: list[Figures] = [_mel_distances(wavs, judges.failed)] if "mel" in metrics.only and reference else []
    if "wer" in metrics.only and speech:
        heard, normalise = judges.words(speech)
        figures.append(word_figures(heard, normalise))
    if "mos" in metrics.only and speech:
        figures.append(judges.mos(speech))
    if "similarity" in metrics.only and ({wav.row for wav in speech} > {"truth"} or judges.prompts):
        figures.append(similarities(judges.speakers([*speech, *judges.prompts])))
    embeddings, references = {}, {}
    if reference is not None and {"mmd", "fad"} & set(metrics.only):
        for domain in dict.fromkeys(wav.clip.domain for wav in wavs):
            embeddings[domain] = judges.embeddings(domain, [wav for wav in wavs if wav.clip.domain == domain])
            if embeddings[domain]:
                references[domain] = reference(domain)
    rows = clip_rows(wavs, figures, seconds, {wav: file_sha256(wav.path) for wav in wavs if wav.path.is_file()})
    summary = summarise(rows, embeddings, references, metrics.only, metrics.confidence)
    names = list(dict.fromkeys(wav.row for wav in wavs))

    def write() -> None:
        (out / "results.json").unlink(missing_ok=True)  # an earlier evaluation's must not stand beside these clips
        write_clips(rows, out / "clips.csv")
        write_embeddings(embeddings, references, names, out / "embeddings.npz")

    judges.ranks.on_rank_0(write)
    return {
        "rows": summary,
        "confidence": metrics.confidence,
        "reference_clips": {domain: len(vectors) for domain, vectors in references.items()},
        "words": {"text": metrics.text, "language": metrics.language} if "asr" in judges.models else {},
        "models": {kind: model.identity for kind, model in judges.models.items()},
        "left_out": {kind: str(test) for kind, test in judges.left_out.items()},
        "failed": judges.failed,
        "torch": torch.__version__,
    }


def _mel_distances(wavs: Sequence[Wav], failed: dict[str, str]) -> Figures:
    """Return the distances that the synthesis wrote; wavs of others have none. Add those of a model that diverged to
    `failed`."""
    figures: Figures = {}
    for wav in wavs:
        file = wav.path.with_suffix(".json")
        if wav.row != "truth" and file.is_file():
            figures[wav] = json.loads(file.read_text())
            if not isfinite(figures[wav]["mel_l1"]):
                failed[f"{wav.row}/{wav.path.name}: mel"] = "the model's mel is not finite"
                del figures[wav]
    return figures


def circular_models(models: Mapping[str, object], index: Index) -> dict[str, str]:
    """Return metric model -> the teacher that has the same weights: its metric rewards alignment itself."""
    domains: dict[str, list[str]] = {}
    for domain in index.domains:
        for entry in index.content["domains"][domain]["teachers"].values():
            domains.setdefault(entry["identity"].get("sha256", ""), []).append(domain)
    used = {kind: {model.identity["sha256"], model.identity.get("encoder_sha256")} for kind, model in models.items()}
    return {
        kind: f"the teacher of {' and '.join(domains[sha256])}"
        for kind, weights in used.items()
        for sha256 in weights & domains.keys()
    }


def write_results(results: dict, wavs: int, out: Path) -> None:
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(out / "results.md", results_markdown(results))
    print_results(results)
    write_report(out)
    print(f"wrote {out}: results.json, results.md, report.html and clips.csv, of {wavs} wavs")
