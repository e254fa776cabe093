"""The picture of soak.py: steps and memory over time, with what struck."""

from pathlib import Path

COLOURS = {
    "SIGKILL rank": "#d62728",
    "SIGKILL loader": "#ff7f0e",
    "SIGKILL launcher": "#9467bd",
    "SIGTERM rank": "#2ca02c",
}
PROCESSES = {"rank 0": "#08519c", "rank 1": "#6baed6", "loader of rank 0": "#636363", "loader of rank 1": "#bdbdbd"}


def plot(content: dict, path: Path) -> None:
    """content: what soak.py writes as JSON."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    seen = set()

    def once(name: str) -> str | None:
        return None if name in seen or seen.add(name) else name

    for stretch in content["stretches"]:
        ended = stretch["ended"] / 60
        began = ended if stretch["first_step"] is None else stretch["first_step"] / 60
        stopped = ended if stretch["struck"] is None else stretch["struck"] / 60
        above.plot([began, stopped], [stretch["resumed_from"], stretch["done"]], color="#08519c", linewidth=1.2)
        if stretch["blow"]:
            colour = COLOURS[stretch["blow"]]
            above.plot([stopped], [stretch["done"]], "x", color=colour, label=once(stretch["blow"]))
            below.axvline(stopped, color=colour, linewidth=0.8)
        for name, samples in stretch["memory"].items():
            times, memory = [time / 60 for time, _ in samples], [mib for _, mib in samples]
            below.plot(times, memory, color=PROCESSES.get(name, "black"), linewidth=1.2, label=once(name))
    above.set_ylabel("optimizer step")
    above.set_title(f"{content['steps']} steps, {content['steps_lost']} lost and done again", fontsize=10)
    below.set_ylabel("resident memory, MiB")
    below.set_xlabel("minutes")
    below.set_ylim(bottom=0)
    for axes in (axes for axes in (above, below) if axes.get_legend_handles_labels()[0]):
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right")
    figure.savefig(path, dpi=130)
