"""Processes that prepare together: what each does, what all must know, and one line when one of them fails.

torchrun and deepspeed start them, or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. They share the
file system that they write to, and exchange little: the process group is gloo's, GPUs or not.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError

_PATIENCE = timedelta(hours=12)  # a rank may wait for the others at the end of a stage
_POLL_SECONDS = 1.0
_AGAIN = "run the same command again, it goes on where it stopped"


class _Agreed(UserError):
    """What one rank failed with, raised on all."""


class _Lost(UserError):
    """Another rank is gone."""


@dataclass
class Ranks:
    """This process among those that prepare. Every rank must call `gather` and `first` in the same order."""

    rank: int = 0
    world: int = 1
    store: Any = None  # the launcher's key-value store, where a failure is posted
    _polled: float = field(default=0.0, repr=False)

    def own(self, items: Sequence) -> Sequence:
        """The part of `items` that is this rank's."""
        return items[self.rank :: self.world]

    def whole(self, parts: list[list]) -> list:
        """The list whose parts every rank has worked on, from what each made of its own."""
        items = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            items[rank :: self.world] = part
        return items

    def gather(self, value: object) -> list:
        """The value of every rank. Raises UserError on all when one of them has failed instead."""
        return self._gather(value, None)

    def first(self, action: Callable[[], Any]) -> Any:
        """What `action` returns on rank 0, which alone runs it."""
        value = action() if self.rank == 0 else None
        self.gather(None)
        return value if self.world == 1 else self._spread(value)

    def loaded(self, what: str, load: Callable[[str], Any]) -> Any:
        """load(this rank's device): on rank 0 first, in whose cache the others find what it has fetched. UserError
        unless its `identity` is the same on all."""
        import torch

        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        found = load(device) if self.rank == 0 else None
        self.gather(None)
        found = found or load(device)
        identities = self.gather(found.identity)
        if any(identity != identities[0] for identity in identities):
            raise UserError(f"{what} has other weights on some ranks: give all of them the same")
        return found

    def poll(self) -> None:
        """To be called now and then where a rank works on its own: raises UserError once another one has failed."""
        if self.world == 1 or time.monotonic() - self._polled < _POLL_SECONDS:
            return
        self._polled = time.monotonic()
        with _connected():
            failed = self.store.check(["failed"])
        if failed:
            self.gather(None)

    def fail(self, error: Exception) -> None:
        """Tell all ranks, whatever they are at; every rank raises. One that others told of it, or left alone, says
        nothing more."""
        if self.world == 1 or isinstance(error, (_Agreed, _Lost)):
            return
        if not isinstance(error, (UserError, OSError)):
            traceback.print_exc()
            error = UserError(f"rank {self.rank}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        with _connected():
            self.store.set("failed", "1")
        self._gather(None, str(_plain(error)))

    def _gather(self, value: object, failure: str | None) -> list:
        if self.world == 1:
            return [value]
        answers = self._exchange((value, failure))
        failures = [text for _, text in answers if text is not None]
        if failures:
            raise _Agreed(failures[0])
        return [answer for answer, _ in answers]

    def _exchange(self, value: object) -> list:
        import torch.distributed as dist

        answers: list = [None] * self.world
        with _connected():
            dist.all_gather_object(answers, value)
        return answers

    def _spread(self, value: object) -> object:
        """Rank 0's value; unlike what _exchange does, it is sent once and may be large."""
        import torch.distributed as dist

        box = [value]
        with _connected():
            dist.broadcast_object_list(box)
        return box[0]


ONE = Ranks()


@contextmanager
def launched(command: str) -> Iterator[Ranks]:
    """The ranks that a launcher has started, or this process alone. A failure of one ends all: rank 0 prints it in one
    line and every process exits with code 2; without a launcher it is raised."""
    ranks = _join()
    try:
        try:
            yield ranks
        except Exception as error:
            ranks.fail(error)
            if (plain := _plain(error)) is error:
                raise
            raise plain from error
    except UserError as error:
        if ranks.world == 1:
            raise
        if ranks.rank == 0 or isinstance(error, _Lost):
            print(f"{command}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, _Agreed):
            with _connected(ignore=True):  # a launcher ends all when one has ended: not before rank 0 has spoken
                ranks.gather(None)
        sys.exit(2)
    finally:
        if ranks.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def _join() -> Ranks:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ONE
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    with _connected():
        store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=5)))
        store = dist.PrefixStore("agrepa-prepare", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    return Ranks(rank, world, store)


def _plain(error: Exception) -> Exception:
    """A full disk or a lost mount in one line; other errors as they are."""
    if isinstance(error, OSError) and error.filename is not None:
        return UserError(f"{error.filename}: {error.strerror}: put that right, then {_AGAIN}")
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{error.strerror}: put that right, then {_AGAIN}")
    return error


@contextmanager
def _connected(ignore: bool = False) -> Iterator[None]:
    """torch.distributed's way of saying that another process is gone, in one line."""
    try:
        yield
    except RuntimeError as error:
        if not ignore:
            reason = " ".join(str(error).split())[:120]
            raise _Lost(f"another rank has ended without a word ({reason}): {_AGAIN}") from error


def agree(action: Callable[[], object]) -> None:
    """Run `action` on rank 0; when it raises UserError, every rank raises it."""
    message = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            message = [str(error)]
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_max(values: torch.Tensor) -> torch.Tensor:
    """The largest of each value over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def all_gather(value: object) -> list:
    """`value` of every rank, on every rank. Every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def first_failure(message: str | None) -> str | None:
    """The message of the first rank that has one, on every rank. Every rank must call it."""
    return next((text for text in all_gather(message) if text is not None), None)
