"""Global norms of the weights and of the last update, at every ZeRO stage."""

from collections.abc import Iterable, Iterator

import torch

from ..ranks import all_sum
from .masters import masters
from .optimizers import RuledOptimizer, optimizer_inside

_CHUNK = 1 << 24  # elements per chunk: bounds the memory that the norms take beside the weights


def weight_norm(engine) -> torch.Tensor:
    """Return the norm of all fp32 master weights, 0-dim fp32. Every rank must call it."""
    squares = [part.square().sum() for weights in masters(engine) for part in weights.flatten().split(_CHUNK)]
    return _global(engine, squares).sqrt()


def update_ratio(engine, lr: float) -> torch.Tensor:
    """Return the norm of the last update over the norm of the weights before it, 0-dim; 0 before the first update. lr:
    of that update. Every rank must call it.

    For AdamW it is computed from the moments, so that no copy of the weights is kept through a step. Muon keeps its own
    sums: the iterations would have to be run again.
    """
    optimizer = optimizer_inside(engine)
    pairs = [(update.square().sum(), before.square().sum()) for update, before in _updates(optimizer, lr)]
    pairs += [share.squares for share in optimizer.shares if share.squares is not None]
    updates, weights = (_global(engine, [pair[part] for pair in pairs]) for part in (0, 1))
    return (updates / weights.clamp_min(torch.finfo(weights.dtype).tiny)).sqrt()


def _updates(optimizer: RuledOptimizer, lr: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (update, weights before it) for every chunk of this rank's masters that AdamW updates."""
    options = optimizer.defaults
    (beta1, beta2), eps = options["betas"], options["eps"]
    for master, state in optimizer.state.items():
        steps = state["step"].double()  # on a GPU, maybe: nothing waits for it
        for kind, decay in (("decayed", lr * options["weight_decay"]), ("plain", 0.0)):
            cut = (optimizer.cut(kind, [master], name) for name in ("weights", "exp_avg", "exp_avg_sq"))
            for parts in zip(*cut, strict=True):
                for after, mean, square in zip(*(part.split(_CHUNK) for part in parts), strict=True):
                    direction = mean / (1 - beta1**steps) / ((square / (1 - beta2**steps)).sqrt() + eps)
                    before = (after + lr * direction) / (1 - decay)
                    yield lr * direction + decay * before, before


def _global(engine, squares: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares over ranks; at stage 0 every rank has all of them."""
    found = list(squares) or [torch.zeros(())]
    total = torch.stack(found).sum().to(engine.device)
    return all_sum(total) if engine.zero_optimization_stage() > 0 else total
