"""Build what a run needs, from its configuration and shards."""

from dataclasses import replace

from ..config import Config
from ..data.index import Index
from ..errors import UserError


def fit_to_shards(config: Config, index: Index) -> Config:
    """Sizes that the shards decide. Raises UserError when the run asks for others."""
    for name, value in (("n_mels", index.n_mels), ("vocab", index.vocab)):
        if getattr(config.model, name) not in (None, value):
            raise UserError(
                f"model.{name}={getattr(config.model, name)}, but the shards in {index.folder} have {value}"
            )
    if config.model.extra_vocab not in (None, index.extra_vocab):
        there = "no second tokens" if index.extra_vocab is None else f"{index.extra_vocab} of them"
        raise UserError(
            f"model.extra_vocab={config.model.extra_vocab}, but the shards in {index.folder} have {there}: "
            f"set model.extra_vocab={'null' if index.extra_vocab is None else index.extra_vocab}"
        )
    return replace(config, model=replace(config.model, n_mels=index.n_mels, vocab=index.vocab))
