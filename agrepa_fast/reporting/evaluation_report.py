"""report.html of an evaluation."""

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from ..evaluation.stored import read_clips, read_results
from .clip_rows import Recorded, clips_within_budget, count_shown
from .evaluation_table import footnotes, results_table
from .page.document import Document, Section, Table

_CLIPS = 40  # at most
ROWS = ("truth", "codes", "sample")  # from left to right


def evaluation_report(folder: Path) -> Document:
    """Return the report of a folder that `agrepa evaluate` wrote. Raises UserError for files that are missing or
    damaged."""
    results = read_results(folder / "results.json")
    rows = read_clips(folder / "clips.csv")
    about = " ".join(f"{line[0].upper()}{line[1:]}." for line in footnotes(results))
    sections = [Section("Results", about, result_tables(results)), *_clips(folder, results, rows)]
    run = folder.resolve().parent.name
    return Document(f"{run}, {folder.resolve().name}", _about(results, rows), _facts(results), sections)


def result_tables(results: Mapping) -> list[Table]:
    """Return a table of metrics per domain."""
    (_, *header), rows = results_table(results)
    return [
        Table(header, [row[1:] for row in rows if row[0] == domain], title=domain)
        for domain in dict.fromkeys(row[0] for row in rows)
    ]


def _about(results: Mapping, rows: Sequence[Mapping]) -> str:
    counts = {
        domain: len({row["key"] for row in rows if row["domain"] == domain})
        for domain in dict.fromkeys(row["domain"] for row in rows)
    }
    clips = ", ".join(f"{count} {domain}" for domain, count in counts.items())
    return f"Evaluation of {clips} clips, {results['confidence']:.0%} intervals over clips."


def _facts(results: Mapping) -> dict[str, str]:
    facts = {}
    if "step" in results:
        facts["weights"] = f"{'averaged' if results['averaged'] else 'live'}, of step {results['step']}"
    else:
        facts["recordings"] = results["folder"]
    if flow := results["flow"]:
        facts["sampler"] = f"{flow['steps']} steps ({flow['solver']}), guidance {flow['guidance']:g}"
    facts["vocoder"] = results["vocoder"]
    facts["clips (manifest)"] = results["manifest"]
    return facts


def _clips(folder: Path, results: Mapping, rows: Sequence[Mapping]) -> list[Section]:
    recorded = recorded_clips({"": (folder, results, rows)})
    if not recorded:
        return []
    clips = clips_within_budget(recorded, _CLIPS)
    names = [name for name in ROWS if any(name in one.files for one in recorded)]
    about = f"{', '.join(names).capitalize()}.{about_codes(recorded)}"
    return [Section("Clips", about + count_shown(clips, recorded), clips=clips)]


def about_codes(recorded: Sequence[Recorded]) -> str:
    """Return a sentence on the version `codes`, if clips have it."""
    there = any("codes" in one.files for one in recorded)
    return " Codes: the mean mel of each token, all that tokens alone say." if there else ""


def recorded_clips(evaluations: Mapping[str, tuple[Path, Mapping, Sequence[Mapping]]]) -> list[Recorded]:
    """Return the clips of evaluations of one manifest, domains in turns: truth and codes of the first, and the samples
    of all. evaluations: the name of its samples, "" for a single one, -> its folder, results.json and clips.csv."""
    found: dict[str, dict[str, Recorded]] = {}
    for name, (folder, results, rows) in evaluations.items():
        for row in rows:
            path = _wav(folder, results, row)
            if row["draw"] or path is None:
                continue
            clip = found.setdefault(row["domain"], {}).setdefault(row["key"], Recorded(row["key"], {}, row["text"], {}))
            version = row["row"] if not name or row["row"] != "sample" else name
            if version not in clip.files:
                clip.files[version], clip.notes[version] = path, _notes(row)
    for clip in chain.from_iterable(clips.values() for clips in found.values()):
        order = [name for name in ROWS if name in clip.files] + [name for name in clip.files if name not in ROWS]
        for version in order:  # a dict keeps the order of insertion
            clip.files[version] = clip.files.pop(version)
    turns = zip_longest(*(clips.values() for clips in found.values()))
    return [clip for turn in turns for clip in turn if clip is not None]


def _wav(folder: Path, results: Mapping, row: Mapping) -> Path | None:
    """Return the recording of a row of clips.csv, None if it is no longer there."""
    elsewhere = results.get("files", {}).get(row["row"], {}).get(row["key"], "")  # of `agrepa evaluate FOLDER`
    places = (folder / "wavs" / row["row"] / f"{row['key']}.wav", Path(elsewhere))
    return next((path for path in places if path.is_file()), None)


def _notes(row: Mapping) -> list[str]:
    """Return the figures of one wav."""
    notes = [
        f"{name} {row[field]:.2f}"
        for field, name in (
            ("mos", "MOS"),
            ("dnsmos_ovrl", "DNSMOS"),
            ("similarity", "similarity"),
            ("similarity_prompt", "similarity with the prompt"),
            ("mel_l1", "mel L1"),
        )
        if row.get(field) is not None
    ]
    if row["words"]:
        notes.append(f"{row['errors']} errors in {row['words']} words")
    if row["heard"]:
        notes.append(f"“{row['heard']}”")
    return notes
