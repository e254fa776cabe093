"""The table of an evaluation, in the terminal and as Markdown."""

from collections.abc import Mapping

from ..evaluation.aggregate import CLIP_METRICS, SET_METRICS
from ..evaluation.mos import SCORE_NAMES

_NAMED = {  # wavs in results.json that need a remark
    "failed": "could not be judged",
    "missing": "of the list are missing, and count as nothing heard",
    "unlisted": "are not in the list, and were not measured",
}


def results_table(results: Mapping) -> tuple[list[str], list[list[str]]]:
    """Return the header, and a row for each metric and domain: value ± half of the interval, for every row of wavs."""
    names, rows = list(results["rows"]), []
    for domain in dict.fromkeys(domain for name in names for domain in results["rows"][name]):
        for metric in (*CLIP_METRICS, *SET_METRICS):
            entries = [results["rows"][name].get(domain, {}).get(metric) for name in names]
            if any(entries):
                clips = sorted({entry["n"] for entry in entries if entry})
                mark = " †" if _model_of(metric, domain) in results["circular"] else ""
                counts = "-".join(map(str, dict.fromkeys((clips[0], clips[-1]))))
                rows.append(
                    [
                        domain,
                        metric + mark,
                        counts,
                        *(_cell(entry, 1 if metric in SET_METRICS else 3) for entry in entries),
                    ]
                )
    return ["", "metric", "clips", *names], rows


def _model_of(metric: str, domain: str) -> str:
    if metric in SET_METRICS:
        return f"{domain}-embedding"
    models = {
        "similarity": "speaker",
        "similarity_prompt": "speaker",
        "mel_l1": "",
        **dict.fromkeys(SCORE_NAMES, "mos"),
    }
    return models.get(metric, "asr")


def _cell(entry: Mapping | None, digits: int) -> str:
    if entry is None:
        return "—"
    if entry["low"] is None:
        return f"{entry['value']:.{digits}f}"
    if abs((entry["high"] - entry["value"]) - (entry["value"] - entry["low"])) < 0.5 * 10**-digits:
        return f"{entry['value']:.{digits}f} ± {entry['high'] - entry['value']:.{digits}f}"
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def footnotes(results: Mapping) -> list[str]:
    """Return the lines below the table."""
    models = ", ".join(f"{kind} {identity['spec']}" for kind, identity in results["models"].items())
    about = f"vocoder {results['vocoder']}, {results['confidence']:.0%} intervals over clips"
    if "step" in results:
        about = f"step {results['step']}, {'averaged' if results['averaged'] else 'live'} weights, {about}"
    lines = [f"{about}, manifest {results['manifest']}", f"metric models: {models or 'none'}"]
    if results["circular"]:
        named = ", ".join(f"{kind} is {teacher}" for kind, teacher in results["circular"].items())
        lines.append(f"† rewards alignment by construction: {named}")
    lines += [f"left out: {kind} failed its self-test: {why}" for kind, why in results["left_out"].items()]
    for name, about in _NAMED.items():
        if wavs := results.get(name):
            count = len({wav.rpartition(": ")[0] for wav in wavs} if name == "failed" else wavs)  # of several models
            first = ", ".join(list(wavs)[:3])
            lines.append(f"{count} wavs {about} ({first}): results.json names them")
    return lines


def results_markdown(results: Mapping) -> str:
    header, rows = results_table(results)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *(f"{line}  " for line in footnotes(results))]) + "\n"


def print_results(results: Mapping) -> None:
    from rich.console import Console
    from rich.table import Table

    header, rows = results_table(results)
    table = Table()
    for name in header:
        table.add_column(name, justify="left" if name in header[:2] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, Console(width=1000).measure(table).maximum)  # a cut number would be another
    console.print(table)
    for line in footnotes(results):
        console.print(line, style="dim", highlight=False, markup=False)  # with names of files
