"""The report of a comparison, as Markdown and as report.html."""

from pathlib import Path

from ..evaluation.stored import read_clips
from .clip_rows import clips_within_budget, count_shown
from .comparison_tables import Comparison, Grid, differences_to_baseline, selections, values
from .evaluation_report import about_codes, recorded_clips
from .page.document import Document, Picture, Section, Table
from .page.media import png_uri

_CLIPS = 12  # at most
_TITLES = {"curves": "learning curves", "val-flow_loss": "validation flow loss"}  # of plots; others: the metric


def report_markdown(comparison: Comparison) -> str:
    """Return the report: what was compared, the layers that were chosen, values, and differences with what could have
    been detected."""
    lines = [f"# {_title(comparison)}", ""]
    lines += [f"* {name}: {value}" for name, value in _facts(comparison).items()]
    lines += [f"* {line}" for line in _warnings(comparison)]
    lines += ["", "## Layers that were chosen", "", *_markdown(selections(comparison))]
    lines += ["", "## Values (mean of the seeds)", "", *_markdown(values(comparison))]
    lines += ["", f"## Differences to {comparison.baseline}", "", *_markdown(differences_to_baseline(comparison)), ""]
    return "\n".join(lines)


def comparison_document(comparison: Comparison, plots: Path) -> Document:
    """Return the page of a comparison: the tables, its plots, and players for the samples of each strategy."""
    about = f"Comparison of {len(comparison.runs)} runs, with {comparison.baseline} as the baseline."
    warnings = " ".join(f"{line}." for line in _warnings(comparison))
    sections = [
        Section(
            f"Differences to {comparison.baseline}", warnings, [_table(differences_to_baseline(comparison), (1, 2, 7))]
        ),
        Section("Values", "Means of the seeds.", [_table(values(comparison), (1,))]),
        Section("Layers that were chosen", tables=[_table(selections(comparison), (1, 2))]),
        *_clips(comparison),
        *_pictures(plots),
    ]
    facts = {name: str(value) for name, value in _facts(comparison).items()}
    return Document(_title(comparison), about, facts, sections)


def _title(comparison: Comparison) -> str:
    return f"{' · '.join(comparison.labels)}, seeds {', '.join(map(str, comparison.seeds))}"


def _facts(comparison: Comparison) -> dict[str, object]:
    results = comparison.runs[0].results
    models = ", ".join(f"{kind} {model['spec']}" for kind, model in results["models"].items())
    made = {"clips (manifest)": results["manifest"], "vocoder": results["vocoder"], "metric models": models or "none"}
    made["intervals"] = f"{100 * results['confidence']:g} %"
    return {**comparison.settings, **made}


def _warnings(comparison: Comparison) -> list[str]:
    circular = dict.fromkeys(pair for run in comparison.runs for pair in run.results["circular"].items())
    lines = [f"{kind} is {teacher} and rewards alignment by construction" for kind, teacher in circular]
    missing = f"failed twice or not run, and missing below: {', '.join(comparison.failed)}"
    return [*lines, missing] if comparison.failed else lines


def _markdown(grid: Grid) -> list[str]:
    lines = [f"| {' | '.join(grid.columns)} |", "|---" * len(grid.columns) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in grid.rows]
    return [*lines, *(["", grid.note] if grid.note else [])]


def _table(grid: Grid, texts: tuple[int, ...]) -> Table:
    return Table(grid.columns, grid.rows, note=grid.note, texts=texts)


def _clips(comparison: Comparison) -> list[Section]:
    """Return the clips of the first seed that the most strategies have."""
    seed = max(comparison.seeds, key=lambda one: (sum(run.seed == one for run in comparison.runs), -one))
    runs = [run for run in comparison.runs if run.seed == seed]
    recorded = recorded_clips(
        {run.label: (run.folder, run.results, read_clips(run.folder / "clips.csv")) for run in runs}
    )
    if not recorded:
        return []
    clips = clips_within_budget(recorded, _CLIPS)
    about = f"Samples of seed {seed}.{about_codes(recorded)}"
    return [Section("Clips", about + count_shown(clips, recorded), clips=clips)]


def _pictures(plots: Path) -> list[Section]:
    paths = sorted(path for path in plots.glob("*.png") if path.stat().st_size)
    pictures = [Picture(_TITLES.get(path.stem, path.stem), png_uri(path)) for path in paths]
    return [Section("Plots", pictures=pictures)] if pictures else []
