"""`agrepa evaluate FOLDER`: recordings from anybody's model, with the true ones beside them if they are there."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..audio.waves import SOUNDFILE_SUFFIXES, decode
from ..config_file import check_used, load_config
from ..corpora.folder import list_folder
from ..corpora.recordings import Recording, count_kinds
from ..corpora.walk import COPY
from ..data.index import Index
from ..errors import UserError
from ..evaluation.evaluate import Judges
from ..evaluation.lists import Utterance, read_list
from ..evaluation.manifest import Clip
from ..evaluation.results import write_manifest
from ..evaluation.synthesis import Wav
from ..files import FolderLock, file_sha256
from ..metrics_config import MetricsConfig
from ..ranks import Ranks
from .evaluation import OF_SPEECH, circular_models, measure, write_results
from .opened import check_out

_USES = tuple(f"metrics.{name}" for name in ("only", "asr", "language", "text", "mos", "speaker", "confidence"))


class Material(NamedTuple):
    """The wavs of an evaluation, those without a file among them. prompts: of a list's wavs; unlisted: recordings of
    the folder that the list lacks."""

    wavs: list[Wav]
    prompts: Sequence[Wav] = ()
    unlisted: Sequence[str] = ()

    @property
    def clips(self) -> list[Clip]:
        return list(dict.fromkeys(wav.clip for wav in self.wavs))


def evaluate_folder(
    folder: Path,
    overrides: Sequence[str],
    ranks: Ranks,
    *,
    domain: str | None,
    reference: Path | None,
    listed: Path | None,
    out: Path | None,
) -> None:
    """Run `agrepa evaluate FOLDER`: measure recordings against their texts, and against those of the same names in
    `reference`, the truths; or against the utterances of a list. Every rank must call it.

    listed: the list, see read_list; `reference` is the folder of its recordings then. Words, opinion and similarity are
    measured; distances between sets need other true recordings than the truths of these, and so a checkpoint with its
    shards. Raises UserError for a folder that holds none, pairs that are missing, and rates that differ.
    """
    if domain is None and listed is None:
        raise UserError("--domain is needed for a folder of recordings: speech or audio")
    config = load_config("demo", overrides)
    check_used(overrides, _USES)
    if domain == "audio" or not OF_SPEECH & set(config.metrics.only):
        raise UserError(
            f"{folder}: a folder of recordings is measured by {', '.join(sorted(OF_SPEECH))}, all of them of speech: "
            "--domain speech, or name a run, whose shards have what the other metrics compare with"
        )
    place = folder.resolve() if folder.name in ("", "..") else folder  # "." and ".." have no name to take
    out = out or place.parent / f"evaluate-{place.name}"
    ranks.on_rank_0(lambda: check_out(out))
    recordings, passed_over = list_folder(folder, domain or "speech")
    if passed_over and ranks.rank == 0:
        kinds = count_kinds(entry.kind for entry in passed_over)
        print(f"{folder}: {len(recordings)} recordings; not taken: {kinds}")
    made = {"folder": str(folder), "reference": str(reference), "vocoder": "none", "flow": None}
    if listed is not None:
        made["list"] = str(listed)
        material = _listed(recordings, folder, listed, ranks.from_rank_0(lambda: read_list(listed, reference)))
    else:
        material = _recorded(recordings, reference, domain, config.metrics.only)
        _check_rates(folder, material.wavs)
    _check_measurable(folder, material, config.metrics.only)
    lock = FolderLock(out, "choose another --out")
    ranks.on_rank_0(lock.acquire)
    try:
        measure_material(material, made, config.metrics, ranks, out)
    finally:
        lock.release()


def measure_material(
    material: Material,
    made: Mapping[str, object],
    metrics: MetricsConfig,
    ranks: Ranks,
    out: Path,
    teachers: Index | None = None,
) -> None:
    """Write manifest, clips and results of wavs that are there. made: the settings that they depend on; teachers:
    shards of a run, whose teachers are marked if they are metric models, too. Every rank must call it."""
    wavs = material.wavs
    manifest = ranks.from_rank_0(lambda: write_manifest(material.clips, made, out / "manifest.json"))
    judges = Judges(metrics, ranks, material.prompts)
    measured = measure(judges, wavs, lambda wav: _length(wav.path)[0], None, out)
    facts = {"manifest": manifest, **made, **measured}
    facts["circular"] = circular_models(judges.models, teachers) if teachers else {}
    facts["missing"] = [f"{wav.row}/{wav.path.name}" for wav in wavs if not wav.path.is_file()]
    facts["unlisted"] = list(material.unlisted)
    facts["files"] = {
        row: {wav.clip.key: str(wav.path.absolute()) for wav in wavs if wav.row == row and wav.clip.draw == 0}
        for row in ("truth", "sample")
    }
    ranks.on_rank_0(lambda: write_results(facts, len(wavs), out))


def _recorded(recordings: Sequence[Recording], reference: Path | None, domain: str, only: Sequence[str]) -> Material:
    """Return the recordings of a folder, with the truths of the same names. Raises UserError if words are counted and
    the text of one cannot be read."""
    truths = _pairs(recordings, reference, domain) if reference is not None else {}
    faults = [one.problem for one in (*recordings, *truths.values()) if one.problem] if "wer" in only else []
    if faults:
        more = f" ({len(faults)} such texts)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{more}: mend or remove it, or leave wer out of metrics.only")
    clips = {r.name: _clip(r, domain, truths.get(r.name)) for r in recordings}
    wavs = [Wav("truth", clips[name], Path(truth.path)) for name, truth in truths.items()]
    return Material([*wavs, *(Wav("sample", clips[r.name], Path(r.path)) for r in recordings)])


def _listed(recordings: Sequence[Recording], folder: Path, listed: Path, utterances: Sequence[Utterance]) -> Material:
    """Return the utterances of a list with the recordings <utterance>.wav of a folder, or of another suffix. Raises
    UserError if it has none of them."""
    there = _by_name(recordings)
    if not (taken := {u.key: there[u.key] for u in utterances if u.key in there}):
        raise UserError(
            f"{folder} has no recording of the {len(utterances)} utterances in {listed}: the first would be "
            f"{utterances[0].key}.wav, and {recordings[0].source} is there"
        )
    files = {key: Path(recording.path) for key, recording in taken.items()}
    used = {recording.source for recording in taken.values()}
    unlisted = [r.source for r in recordings if r.source not in used]
    clips = [(clip_of(u), u) for u in utterances]
    return listed_material(clips, lambda clip: files.get(clip.key, folder / f"{clip.key}.wav"), unlisted)


def listed_material(
    clips: Sequence[tuple[Clip, Utterance]], sample: Callable[[Clip], Path], unlisted: Sequence[str] = ()
) -> Material:
    """Return the truths, samples and prompts of utterances. sample: where the sample of a clip is, or would be."""
    first = [(clip, utterance) for clip, utterance in clips if clip.draw == 0]
    wavs = [Wav("truth", clip, utterance.truth) for clip, utterance in first if utterance.truth]
    wavs += [Wav("sample", clip, sample(clip)) for clip, _ in clips]
    return Material(wavs, [Wav("prompt", clip, u.prompt) for clip, u in first if u.prompt], unlisted)


def clip_of(utterance: Utterance, draw: int = 0) -> Clip:
    """Return the clip of an utterance, which its text, its prompt's and the contents of its recordings make."""
    said = utterance.prompt_text + utterance.lead
    made = "".join([*(file_sha256(file) for file in (utterance.truth, utterance.prompt) if file), said])
    return Clip("speech", utterance.key, draw, 0, utterance.text, hashlib.sha256(made.encode()).hexdigest()[:16])


def _pairs(recordings: Sequence[Recording], reference: Path, domain: str) -> dict[str, Recording]:
    """Return name -> the true recording of the same path below `reference`, with any suffix."""
    found, passed_over = list_folder(reference, domain)
    truths, wanted = _by_name(found), _by_name(recordings).keys()
    for entry in passed_over:  # a video beside a sound is no question, two sounds are
        name = Path(entry.name)
        if entry.kind.endswith(COPY) and name.suffix in SOUNDFILE_SUFFIXES and str(name.with_suffix("")) in wanted:
            raise UserError(f"--reference {reference}: {name} has a copy, {entry.reason}: keep one")
    missing = [r.source for r in recordings if str(Path(r.source).with_suffix("")) not in truths]
    if missing:
        named = ", ".join(missing[:3])
        raise UserError(
            f"--reference {reference}: {len(missing)} of {len(recordings)} recordings have no partner: {named}; give "
            "every one its own, by its name"
        )
    return {r.name: truths[str(Path(r.source).with_suffix(""))] for r in recordings}


def _by_name(recordings: Sequence[Recording]) -> dict[str, Recording]:
    """Return path without suffix -> recording. No two have one name, see list_folder."""
    return {str(Path(recording.source).with_suffix("")): recording for recording in recordings}


def _clip(recording: Recording, domain: str, truth: Recording | None) -> Clip:
    text = recording.text or (truth.text if truth else "")
    return Clip(domain, recording.name, 0, 0, text, file_sha256(Path(truth.path))[:16] if truth else "")


def _check_measurable(folder: Path, material: Material, only: Sequence[str]) -> None:
    """Raise UserError if none of the metrics has what it compares with."""
    true, texts = any(wav.row == "truth" for wav in material.wavs), any(clip.text for clip in material.clips)
    possible = {"mos": True, "wer": true or texts, "similarity": true or bool(material.prompts)}
    if not any(possible.get(metric) for metric in only):
        raise UserError(
            f"{folder}: wer needs texts (NAME.txt beside the recordings), or true recordings, and similarity needs "
            "these: give --reference FOLDER"
        )


def _check_rates(folder: Path, wavs: Sequence[Wav]) -> None:
    if len(rates := {_length(wav.path)[1] for wav in wavs} - {0}) > 1:
        raise UserError(f"{folder}: rates of {' and '.join(map(str, sorted(rates)))} Hz: resample all to one rate")


def _length(path: Path) -> tuple[float, int]:
    """Return seconds and the rate in Hz; 0 and 0 for a file that cannot be decoded, which the metrics name."""
    try:
        wave, rate = decode(path, path.name)  # a header may lack the length
    except UserError:
        return 0.0, 0
    return len(wave) / rate if rate else 0.0, rate
