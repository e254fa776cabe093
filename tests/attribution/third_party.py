"""Random models in the manner of third parties, to compare ablate with: other arguments, outputs, loops and caches.

A block that is `left_out` computes everything as before and hands on its state as it got it, the meaning of FoG-A; a
branch returns zeros.
"""

import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn

CLIPS, FRAMES, WIDTH, HEADS, MEMORY = 3, 6, 8, 2, 5
CONDITIONS = [
    "sequence",
    "memory",
    "vector",
    "times",
    "rows",
    "table",
    "heads",
    "pair",
    "mapping",
    "fields",
    "space",
    "cache",
]
OUTPUTS = ["tensor", "tensor", "tuple", "second", "mapping", "fields", "named"]
PATTERNS = ["once", "once", "loop", "euler", "guided", "doubled", "reversed", "shared"]
FAULTS = ["batch", "first", "place", "branch", "scratch"]  # none of them can be gated


@dataclass
class Fields:
    vector: torch.Tensor
    mask: torch.Tensor
    rate: float = 0.5


class Named(NamedTuple):
    hidden: torch.Tensor
    weights: torch.Tensor | None


@dataclass
class Returned:
    hidden: torch.Tensor
    weights: torch.Tensor | None = None


def condition(kind: str, x: torch.Tensor):
    """A condition with a row for each of x, or without rows."""
    first, rows = x[..., :1], len(x)
    vector = x.mean(1)
    mask = (x[..., 0] > -1).float()
    return {
        "sequence": lambda: x.roll(1, 1),
        "memory": lambda: x[:, :MEMORY],
        "vector": lambda: vector,
        "times": lambda: torch.tensor([0.3]),
        "rows": lambda: vector[:, 0],
        "table": lambda: torch.linspace(-1, 1, FRAMES * WIDTH).view(FRAMES, WIDTH),
        "heads": lambda: torch.cat([first @ first.mT, -first @ first.mT], 1).view(rows * HEADS, FRAMES, FRAMES),
        "pair": lambda: (vector, torch.linspace(0, 1, WIDTH)),
        "mapping": lambda: {"mask": mask, "more": [vector]},
        "fields": lambda: Fields(vector, mask),
        "space": lambda: SimpleNamespace(vector=vector, mask=mask),
        "cache": lambda: [None],
    }[kind]()


def effect(kind: str, value, x: torch.Tensor) -> torch.Tensor:
    """What a condition adds within a block; x (N, T, D)."""
    if kind in ("sequence", "table"):
        return 0.5 * value
    if kind == "memory":
        return torch.softmax(x @ value.mT, -1) @ value
    if kind == "vector":
        return value[:, None]
    if kind in ("times", "rows"):
        return value.view(-1, 1, 1) * x.flip(1)
    if kind == "heads":
        return 0.2 * value.view(len(x), HEADS, x.shape[1], -1).mean(1) @ x
    if kind == "pair":
        return value[0][:, None] * value[1]
    if kind == "mapping":
        return value["mask"][..., None] * value["more"][0][:, None]
    if kind in ("fields", "space"):
        return value.vector[:, None] * value.mask[..., None]
    value[0] = x if value[0] is None else torch.cat((value[0], x), 1)
    return value[0].mean(1, keepdim=True)


class Block(nn.Module):
    def __init__(self, shape: "Shape"):
        super().__init__()
        self.shape, self.left_out = shape, False
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.register_buffer("scratch", torch.zeros(0), persistent=False)

    def forward(self, *args, **kwargs):
        given = dict(zip(self.shape.names, args, strict=False)) | kwargs
        x, before = given["x"], given["x"].clone()
        rows = x.transpose(0, 1) if self.shape.time_first else x
        update = self.linear(self.norm(rows)) + sum(effect(k, given[k], rows) for k in self.shape.conditions)
        if self.shape.fault == "batch":
            update = update + rows.mean(0)
        if self.shape.fault == "scratch":
            update = update + self.scratch.sum()
            self.scratch = torch.cat((self.scratch, update.flatten()[:1]))
        weights = torch.softmax(rows @ rows.mT, -1)
        update = torch.tanh(update + weights @ rows)
        update = update.transpose(0, 1) if self.shape.time_first else update
        if self.shape.kind == "branch":
            hidden = torch.zeros_like(update) if self.left_out else update
        else:
            hidden = x.add_(update) if self.shape.fault == "place" else x + update
            hidden = before if self.left_out else hidden
        other = given[self.shape.conditions[0]] if self.shape.hands_on else weights
        return {
            "tensor": lambda: hidden,
            "tuple": lambda: (hidden, other),
            "second": lambda: (other, hidden),
            "mapping": lambda: {"weights": other, "hidden": hidden},
            "fields": lambda: Returned(hidden, other),
            "named": lambda: Named(hidden, other),
        }[self.shape.output]()


@dataclass
class Shape:
    """All that is drawn of a model."""

    draw: random.Random

    def __post_init__(self):
        draw = self.draw
        self.depth, self.pattern = draw.randint(2, 4), draw.choice(PATTERNS)
        self.conditions = draw.sample(CONDITIONS, draw.randint(0, 3))
        self.names = ["x", *self.conditions]
        draw.shuffle(self.names)
        self.positional = draw.randint(0, len(self.names))  # the others go by keyword
        self.output = draw.choice(OUTPUTS)
        self.hands_on = bool(self.conditions) and draw.random() < 0.3
        self.own_conditions = draw.random() < 0.2  # of every call, made of the state
        self.time_first = draw.random() < 0.15
        self.between = draw.choice(["", "", "add", "skip"])
        self.fault = draw.choice(FAULTS) if draw.random() < 0.25 else ""
        self.model_output = draw.choice(["tensor", "tuple", "sample", "only", "last_hidden_state"])
        self.state = "x" if draw.random() < 0.3 else None
        self.kind = "branch" if draw.random() < 0.2 and self.fault != "place" else "block"

    @property
    def refusable(self) -> bool:
        """Whether it has a fault, keeps a cache, or a second argument of the state's shape that changes like it."""
        alike = "sequence" in self.conditions and not self.time_first and self.state is None and self.kind == "block"
        ambiguous = alike and (self.own_conditions or self.between == "add")
        return bool(self.fault) or "cache" in self.conditions or ambiguous


class Model(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        own = [Block(shape) for _ in range(shape.depth)]
        self.blocks = nn.ModuleList([*own, *own[:1]] if shape.pattern == "shared" else own)
        for block in own:  # a signature with names
            names = ", ".join(shape.names)
            call = ", ".join(f"{name}={name}" for name in shape.names)
            scope = {"forward": block.forward}
            exec(f"def named({names}): return forward({call})", scope)
            block.forward = scope["named"]
        self.mix, self.head = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x):
        shape = self.shape
        doubled = torch.cat((x, -x)) if shape.pattern == "doubled" else x
        h = self.stack(doubled, doubled)
        if shape.pattern == "loop":
            h = self.stack(h, doubled)
        elif shape.pattern == "euler":
            for _ in range(2):
                h = x + 0.3 * self.stack(h, x)
        elif shape.pattern == "guided":
            h = h + 2 * (h - self.stack(0.5 * x, 0.5 * x))
        elif shape.pattern == "doubled":
            cond, uncond = h.chunk(2)
            h = cond + 2 * (cond - uncond)
        if shape.fault == "first":
            h = h - 0.3 * h[:1]
        if shape.fault == "branch" and h.abs().mean() > 1:
            h = torch.tanh(h)
        v = self.head(h)
        return {
            "tensor": lambda: v,
            "tuple": lambda: (v, h),
            "sample": lambda: {"aux": h, "sample": v},
            "only": lambda: {"anything": v},
            "last_hidden_state": lambda: SimpleNamespace(first=h, last_hidden_state=v),
        }[shape.model_output]()

    def stack(self, x, source):
        shape = self.shape
        given, skips = self.conditions(source), []
        blocks = list(self.blocks)[::-1] if shape.pattern == "reversed" else self.blocks
        for number, block in enumerate(blocks):
            skips.append(x)
            if shape.between == "add":
                x = x + 0.1
            elif shape.between == "skip" and number >= 2:
                x = self.mix(torch.cat((x, skips[number - 2]), -1))
            if shape.own_conditions:
                given = self.conditions(x)
            turned = x.transpose(0, 1) if shape.time_first else x
            arguments = {**given, "x": turned}
            first = [arguments.pop(name) for name in shape.names[: shape.positional]]
            out = block(*first, **arguments)
            before = x
            x = {
                "tensor": lambda out: out,
                "tuple": lambda out: out[0],
                "second": lambda out: out[1],
                "mapping": lambda out: out["hidden"],
                "fields": lambda out: out.hidden,
                "named": lambda out: out.hidden,
            }[shape.output](out)
            x = x.transpose(0, 1) if shape.time_first else x
            x = before + x if shape.kind == "branch" else x
        return x

    def forget(self):
        for block in self.blocks:
            block.scratch = torch.zeros(0)

    def conditions(self, x):
        return {kind: condition(kind, x) for kind in self.shape.conditions}


def random_model(seed: int) -> tuple[Model, dict, list[nn.Module]]:
    """The model, its inputs and its distinct blocks."""
    torch.manual_seed(seed)
    model = Model(Shape(random.Random(seed))).eval()
    return model, {"x": torch.randn(CLIPS, FRAMES, WIDTH)}, list(dict.fromkeys(model.blocks))


@torch.no_grad()
def scores_one_by_one(model: Model, inputs: dict, blocks: list[nn.Module]) -> torch.Tensor:
    """(L, C): one forward per block, in which it is left out of all of its calls."""

    def velocity() -> torch.Tensor:
        model.forget()
        out = model(**inputs)
        out = out[0] if isinstance(out, tuple) else out
        out = vars(out) if isinstance(out, SimpleNamespace) else out
        if isinstance(out, dict):
            out = next(out[name] for name in ("sample", "last_hidden_state", "anything") if name in out)
        return out.flatten(1)

    base, scores = velocity(), []
    for block in blocks:
        block.left_out = True
        scores.append((velocity() - base).norm(dim=1) / base.norm(dim=1))
        block.left_out = False
    model.forget()
    return torch.stack(scores)
