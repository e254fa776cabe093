"""`agrepa evaluate FOLDER`: recordings from anybody's model, with the true ones beside them if they are there."""

from collections.abc import Sequence
from pathlib import Path

import soundfile

from ..config_file import check_used, load_config
from ..corpora.folder import folder_recordings
from ..corpora.recordings import Recording
from ..errors import UserError
from ..evaluation.evaluate import Judges
from ..evaluation.manifest import Clip
from ..evaluation.results import write_manifest
from ..evaluation.synthesis import Wav
from ..files import FolderLock, check_writable, file_sha256
from ..ranks import Ranks
from .evaluation import measure, write_results


def evaluate_folder(
    folder: Path,
    overrides: Sequence[str],
    ranks: Ranks,
    *,
    domain: str | None,
    reference: Path | None,
    out: Path | None,
) -> None:
    """Run `agrepa evaluate FOLDER`: measure recordings against their texts, and against those of the same names in
    `reference`, the truths. Every rank must call it.

    Words, opinion and similarity are measured; distances between sets need other true recordings than the truths of
    these, and so a checkpoint with its shards. Raises UserError for a folder that holds none, pairs that are missing,
    and rates that differ.
    """
    if domain is None:
        raise UserError("--domain is needed for a folder of recordings: speech or audio")
    config = load_config("demo", overrides)
    check_used(overrides, ("metrics",))
    out = out or folder.parent / f"evaluate-{folder.name}"
    ranks.on_rank_0(lambda: check_writable(out, "--out"))
    recordings = folder_recordings(folder, domain)
    truths = _pairs(recordings, reference, domain) if reference is not None else {}
    clips = {r.name: _clip(r, domain, truths.get(r.name)) for r in recordings}
    wavs = [Wav("truth", clips[name], Path(truth.path)) for name, truth in truths.items()]
    wavs += [Wav("sample", clips[r.name], Path(r.path)) for r in recordings]
    lengths = {wav: _length(wav.path) for wav in wavs}
    if len(rates := {rate for _, rate in lengths.values()} - {0}) > 1:
        raise UserError(f"{folder}: rates of {' and '.join(map(str, sorted(rates)))} Hz: resample all to one rate")
    lock = FolderLock(out, "choose another --out")
    ranks.on_rank_0(lock.acquire)
    try:
        made = {"folder": str(folder), "reference": str(reference), "vocoder": "none", "flow": None}
        manifest = ranks.from_rank_0(lambda: write_manifest(list(clips.values()), made, out / "manifest.json"))
        judges = Judges(config.metrics, ranks)
        measured = measure(judges, wavs, lambda wav: lengths[wav][0], None, out)
        facts = {"manifest": manifest, **made, **measured, "circular": {}}
        ranks.on_rank_0(lambda: write_results(facts, len(wavs), out))
    finally:
        lock.release()


def _pairs(recordings: Sequence[Recording], reference: Path, domain: str) -> dict[str, Recording]:
    """Return name -> the true recording of the same path below `reference`, whatever its suffix."""
    there = {str(Path(r.source).with_suffix("")): r for r in folder_recordings(reference, domain)}
    missing = [r.source for r in recordings if str(Path(r.source).with_suffix("")) not in there]
    if missing:
        named = ", ".join(missing[:3])
        raise UserError(
            f"--reference {reference}: {len(missing)} of {len(recordings)} recordings have no partner: {named}; give "
            "every one its own, by its name"
        )
    return {r.name: there[str(Path(r.source).with_suffix(""))] for r in recordings}


def _clip(recording: Recording, domain: str, truth: Recording | None) -> Clip:
    text = recording.text or (truth.text if truth else "")
    return Clip(domain, recording.name, 0, 0, text, file_sha256(Path(truth.path))[:16] if truth else "")


def _length(path: Path) -> tuple[float, int]:
    """Return seconds and the rate in Hz; 0 and 0 for a file that is no recording, which the metrics name."""
    try:
        facts = soundfile.info(path)
    except soundfile.LibsndfileError:
        return 0.0, 0
    return facts.duration, facts.samplerate
