"""Draw the pictures of README.md and docs/: `python docs/figures.py`, from the repository's root.

method.png shows the method; architecture.png shows the rooms of agrepa_fast/ and which of them import which, read from
the source.
"""

import ast
from collections import Counter
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "agrepa_fast"
INK, BLUE, ORANGE, GREY, GREEN = "#222222", "#1f77b4", "#ff7f0e", "#b8b8b8", "#2a8c55"
ROOMS = {  # from top to bottom: a room imports only rooms below it
    "cli": "parsers of the agrepa command",
    "train": "parse, build, loop, finish",
    "reporting": "tables, plots, reports, listening page",
    "evaluation": "synthesis, metrics, intervals, comparisons",
    "training": "builder, run and step, metrics, captured steps",
    "checkpoints": "save, load, export, upload",
    "zero": "everything that knows DeepSpeed",
    "probing": "fixed clips, validation, probes, schedule",
    "alignment": "heads, objectives, the aligner",
    "attribution": "gates, FoG-A, storage measures, selection",
    "prepare": "recordings to shards",
    "corpora": "where recordings come from",
    "tokenizers": "clips to ids",
    "teachers": "frozen encoders",
    "audio": "waves, log-mels, vocoders",
    "data": "shards to batches",
    "flow": "path, draws, loss, sampler",
    "models": "the Backbone protocol, and the models",
    "ground floor": "config, errors, files, ranks, seeds, device",
    "kernels": "Triton and C++ operations; knows no audio",
}


def main() -> None:
    draw_method(DOCS / "method.png")
    draw_architecture(DOCS / "architecture.png")


def new_axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_axis_off()
    return figure, axes


def box(
    axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    *,
    colour: str = "white",
    ink: str = INK,
    size: float = 9,
) -> None:
    style = "round,pad=0.02,rounding_size=0.06"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=ink, linewidth=1.2)
    )
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        color=ink if colour == "white" else "white",
        fontsize=size,
    )


def arrow(
    axes,
    start: tuple[float, float],
    end: tuple[float, float],
    *,
    colour: str = INK,
    style: str = "-|>",
    width: float = 1.2,
    bend: float = 0.0,
) -> None:
    patch = FancyArrowPatch(
        start,
        end,
        arrowstyle=style,
        mutation_scale=11,
        color=colour,
        linewidth=width,
        connectionstyle=f"arc3,rad={bend}",
        shrinkA=1,
        shrinkB=1,
    )
    axes.add_patch(patch)


def draw_method(path: Path) -> None:
    """Three panels: leave one block out, rank the layers, align the first three."""
    figure, axes = new_axes(11, 4.3)
    axes.set_xlim(0, 11)
    axes.set_ylim(-0.1, 4.5)
    layers, left_out, chosen = 6, 3, (1, 2, 4)
    changes = (0.9, 0.62, 0.22, 0.48, 0.3, 0.16)

    axes.text(1.6, 4.3, "1  Probe: leave one block out", ha="center", fontsize=11, color=INK)
    for layer in range(1, layers + 1):
        y = 0.45 + 0.5 * (layer - 1)
        off = layer == left_out
        box(axes, 0.9, y, 1.4, 0.34, f"L{layer}  gate 0" if off else f"L{layer}", ink=GREY if off else INK)
        if layer < layers:
            arrow(axes, (1.6, y + 0.36), (1.6, y + 0.5), colour=INK)
    arrow(
        axes, (0.88, 0.45 + 0.5 * (left_out - 1) - 0.08), (0.88, 0.45 + 0.5 * left_out - 0.02), colour=BLUE, bend=-0.9
    )
    arrow(axes, (1.6, 0.12), (1.6, 0.43))
    axes.text(1.6, 0.0, "noisy mel $x_t$, time $t$, condition $c$", ha="center", va="center", fontsize=9, color=INK)
    arrow(axes, (1.6, 3.31), (1.6, 3.58))
    axes.text(
        1.6, 3.78, r"velocity $v^{\setminus k}$, compared with $v$", ha="center", va="center", fontsize=10, color=INK
    )

    axes.text(5.4, 4.3, "2  Rank: change of the velocity", ha="center", fontsize=11, color=INK)
    for layer, change in enumerate(changes, start=1):
        y = 0.45 + 0.5 * (layer - 1)
        axes.barh(y + 0.17, 2.4 * change, height=0.32, left=4.3, color=BLUE if layer in chosen else GREY)
        axes.text(4.2, y + 0.17, f"L{layer}", ha="right", va="center", fontsize=9, color=INK)
    axes.text(
        5.4,
        3.78,
        r"FoG-A$_k$ = E[ $\Vert v^{\setminus k} - v\Vert\,/\,\Vert v\Vert$ ]",
        ha="center",
        va="center",
        fontsize=10,
        color=INK,
    )
    axes.text(5.4, 0.0, "per domain, with standard errors", ha="center", va="center", fontsize=9, color=INK)

    axes.text(9.2, 4.3, "3  Align the layers that contribute most", ha="center", fontsize=11, color=INK)
    for layer in range(1, layers + 1):
        y = 0.45 + 0.5 * (layer - 1)
        box(axes, 8.0, y, 0.8, 0.34, f"L{layer}", colour=BLUE if layer in chosen else "white", ink=INK)
        if layer in chosen:
            box(axes, 9.2, y, 0.7, 0.34, "head", ink=ORANGE, size=8)
            arrow(axes, (8.84, y + 0.17), (9.17, y + 0.17), colour=ORANGE)
            arrow(axes, (9.93, y + 0.17), (10.28, 1.62), colour=ORANGE)
    box(axes, 10.3, 1.3, 0.62, 0.64, "frozen\nteacher", colour=GREEN, size=7.5)
    axes.text(
        9.2, 3.78, r"$L = L_{flow} + \Sigma_k\,\lambda_k\,(1 - \cos)$", ha="center", va="center", fontsize=10, color=INK
    )
    axes.text(9.2, 0.0, "Whisper for speech, BEATs for audio", ha="center", va="center", fontsize=9, color=INK)
    for x in (3.3, 7.4):
        arrow(axes, (x - 0.25, 1.9), (x + 0.2, 1.9), width=2.2, colour=GREY)
    figure.savefig(path, dpi=110)


def room_of(module: tuple[str, ...]) -> str:
    return module[0] if module[0] in ROOMS else "ground floor"


def imports() -> Counter:
    """Count, for every pair of rooms, the imports of the first from the second."""
    count: Counter = Counter()
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level:
                folder = list(module[: len(module) - node.level])
                target = (*folder, *(node.module or "").split(".")) if node.module else tuple(folder)
            elif (node.module or "").startswith("agrepa_fast."):
                target = tuple(node.module.split(".")[1:])
            else:
                continue
            target = target if target and target[0] else tuple(alias.name for alias in node.names)
            if module != ("__init__",) and target:
                count[room_of(module), room_of(target)] += 1
    return count


def draw_architecture(path: Path) -> None:
    """A matrix: how often the room of a row imports the room of a column. Nothing stands above the diagonal."""
    count, names = imports(), list(ROOMS)
    figure, axes = new_axes(10.5, 6.6)
    axes.set_xlim(-4.6, len(names) + 8.5)
    axes.set_ylim(-len(names) + 0.3, 3.4)
    most = max(number for (above, below), number in count.items() if above != below)
    for row, above in enumerate(names):
        axes.text(-0.8, -row, above, ha="right", va="center", fontsize=10, color=INK)
        axes.text(len(names) + 0.2, -row, ROOMS[above], ha="left", va="center", fontsize=9, color=INK)
        axes.text(row, 0.8, above, ha="left", va="bottom", fontsize=8, color=INK, rotation=50)
        axes.plot([-0.5, len(names) - 0.5], [-row - 0.5] * 2, color="#eeeeee", linewidth=0.8)
        for column, below in enumerate(names):
            number = count[above, below]
            if row == column:
                axes.add_patch(Rectangle((column - 0.45, -row - 0.45), 0.9, 0.9, facecolor="#dddddd"))
            elif number:
                strength = 0.25 + 0.75 * min(1.0, (number / most) ** 0.5)
                colour = BLUE if column > row else "red"
                axes.add_patch(Rectangle((column - 0.45, -row - 0.45), 0.9, 0.9, facecolor=colour, alpha=strength))
                axes.text(column, -row, str(number), ha="center", va="center", fontsize=7, color="white")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
