"""Processes that work together: rank 0 acts, every rank learns the result, and all fail if one does.

Training joins DeepSpeed's process group and calls the functions at the end of this file. Preparation makes a group of
its own (`launched`): its ranks share the file system that they write to and exchange little, so the group is gloo's,
with GPUs or without.
"""

import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .errors import UserError, one_line
from .launch import check_master_address, complete_launch_environment, local_device, why_not_joined

PATIENCE = timedelta(hours=12)  # ranks wait while rank 0 prepares recordings; torch's default is 10 or 30 minutes
_CHECK_SECONDS = 1.0  # between two looks for failed ranks
_ALIKE_SECONDS = 5.0  # between the first and the last rank that raise the same error


class AgreedError(UserError):
    """A failure that every rank raises: rank 0 prints it."""


class LostRankError(UserError):
    """Another rank has ended, and did not say why."""


@dataclass
class Ranks:
    """This process among those that work together. Every rank must call `all_gather`, `agreeing`, `on_rank_0`,
    `from_rank_0` and `load_on_every_rank` in the same order."""

    rank: int = 0
    world: int = 1
    store: Any = None  # in preparation: the launcher's key-value store, where a failure is posted
    _checked: float = field(default=0.0, repr=False)

    def all_gather(self, value: object) -> list:
        """Return the value of every rank. Raises UserError on all if one of them has failed instead."""
        return self._agree(value, None)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Wait at the end for all ranks. If one of them has an error inside, all raise it: the others at the end, or in
        the method of this class that they call next. Before any other collective inside, such as all_sum, all ranks
        must meet in one of these methods: it would wait for a rank that has failed."""
        try:
            yield
        except Exception as error:
            self.fail_everywhere(error)
            raise
        self.all_gather(None)

    def on_rank_0(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 and wait for it on every rank. Raises UserError on all if `action` fails."""
        with self.agreeing():
            if self.rank == 0:
                action()

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """Return the result of `make` on rank 0, which alone calls it. Raises UserError on all if `make` fails."""
        made = []
        self.on_rank_0(lambda: made.append(make()))
        return made[0] if self.world == 1 else self._broadcast(made[0] if made else None)

    def load_on_every_rank(self, name: str, load: Callable[[str], Any]) -> Any:
        """Return load(this rank's device). Rank 0 goes first, and the others find its downloads in the cache.
        Raises UserError unless all have loaded the same `identity`."""
        device = str(local_device())
        loaded = load(device) if self.rank == 0 else None
        self.all_gather(None)
        if loaded is None:
            loaded = load(device)
        identities = self.all_gather(loaded.identity)
        if any(identity != identities[0] for identity in identities):
            raise UserError(f"{name} has other weights on some ranks: give all of them the same")
        return loaded

    def part_of(self, items: Sequence) -> Sequence:
        """Return those of `items` that this rank works on."""
        return items[self.rank :: self.world]

    def join_parts(self, parts: list[list]) -> list:
        """Return the results in the order of the items. parts: every rank's results for its part_of them."""
        items = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            items[rank :: self.world] = part
        return items

    def check_others(self) -> None:
        """Raise UserError if another rank has failed. Call it now and then while this rank works on its own; it asks at
        most once a second."""
        if self.world == 1 or time.monotonic() - self._checked < _CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        with self._connected():
            failed = self.store.check(["failed"])
        if failed:
            self.all_gather(None)

    def fail_everywhere(self, error: Exception) -> None:
        """Tell all ranks of this one's error; they raise it in their next `all_gather`, `on_rank_0` or `check_others`,
        and so does this one. Does nothing if `error` was raised because another rank failed or ended, or if this
        process has no other ranks."""
        if self.world == 1 or isinstance(error, (AgreedError, LostRankError)) or of_lost_rank(error):
            return
        line, known = str(_in_one_line(error)), isinstance(error, (UserError, OSError))
        if not known:
            traceback.print_exc()
            line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if self.rank or not known:  # a line without a rank is about the input, or about rank 0's machine
            line = f"rank {self.rank} on {socket.gethostname()}: {line}"
        self._post_failure()
        try:
            self._agree(None, line)
        except AgreedError:
            raise
        except Exception:  # the others were in another collective
            print(line, file=sys.stderr)
            raise

    def _agree(self, value: object, failure: str | None) -> list:
        """Return the value of every rank, or raise the first failure on all."""
        if self.world == 1:
            return [value]
        answers = self._exchange((value, failure))
        failures = [text for _, text in answers if text is not None]
        if failures:
            raise AgreedError(failures[0])
        return [answer for answer, _ in answers]

    def _exchange(self, value: object) -> list:
        answers: list = [None] * self.world
        with self._connected():
            dist.all_gather_object(answers, value)
        return answers

    def _broadcast(self, value: object) -> object:
        """Return rank 0's value. Unlike in _exchange it is sent once, and may be large."""
        box = [value]
        with self._connected():
            dist.broadcast_object_list(box)
        return box[0]

    def _post_failure(self) -> None:
        """Let ranks that work on their own know that they must stop and agree."""
        if self.store is not None:
            with self._connected():
                self.store.set("failed", "1")

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """In preparation, raise one line where torch.distributed reports that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.store is None:
                raise
            raise _lost(error) from error


ALONE = Ranks()


@contextmanager
def launched(command: str) -> Iterator[Ranks]:
    """Join the ranks that a launcher has started for preparation, or none. A failure of one ends all: rank 0 prints it
    in one line and every process exits with code 2. Without a launcher it is raised."""
    ranks = _join()
    try:
        try:
            yield ranks
        except Exception as error:
            ranks.fail_everywhere(error)
            if (plain := _in_one_line(error)) is error:
                raise
            raise plain from error
    except UserError as error:
        if ranks.world == 1:
            raise
        if ranks.rank == 0 or isinstance(error, LostRankError):
            print(f"{command}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, AgreedError):
            with suppress(LostRankError):  # a launcher kills the others when one has ended: let rank 0 print first
                ranks.all_gather(None)
        sys.exit(2)
    finally:
        if ranks.world > 1:
            dist.destroy_process_group()


def _join() -> Ranks:
    from torch.distributed.rendezvous import rendezvous

    if complete_launch_environment() == 1:
        return ALONE
    check_master_address()
    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(minutes=5)))
        store = dist.PrefixStore("agrepa-prepare", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise UserError(why_not_joined(error)) from error
    return Ranks(rank, world, store)


def _lost(error: RuntimeError) -> LostRankError:
    reason = " ".join(str(error).split())[:120]
    again = "run the same command again, it goes on where it stopped"
    return LostRankError(f"another rank has ended without a word ({reason}): {again}")


def of_lost_rank(error: Exception) -> bool:
    """Return whether torch.distributed says by an error that another rank has ended, or does not answer."""
    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    return of_gloo or isinstance(error, dist.DistBackendError | dist.DistNetworkError)


def _in_one_line(error: Exception) -> Exception:
    """Return a UserError for a full disk or a lost mount, and other errors as they are."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{one_line(error)}: put that right, then run the same command again")
    return error


def _training_ranks() -> Ranks:
    """The ranks of the run's process group; this process alone if it has joined none."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


def agreeing() -> AbstractContextManager[None]:
    """Inside, an error of one rank is raised on all, see Ranks.agreeing. Every rank must enter it."""
    return _training_ranks().agreeing()


@contextmanager
def raising_alike() -> Iterator[None]:
    """Inside, a UserError that every rank raises becomes an AgreedError. Use it where another library's collectives
    run: this function calls no collective, since ranks that did not fail would not come to it. A rank that fails alone
    raises its error seconds later."""
    try:
        yield
    except AgreedError:
        raise
    except UserError as error:
        if dist.is_initialized() and _every_rank_has(str(error)):
            raise AgreedError(str(error)) from error
        raise


def _every_rank_has(line: str) -> bool:
    """Return whether every rank calls this with the same line, all within seconds."""
    store, known_to_all = dist.distributed_c10d._get_default_store(), f"{line}: on all ranks"
    try:
        if store.add(line, 1) == dist.get_world_size():
            store.set(known_to_all, "")
        store.wait([known_to_all], timedelta(seconds=_ALIKE_SECONDS))
    except RuntimeError:  # the time is over, or the rank that keeps the store has ended
        return False
    return True


def on_rank_0(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 and wait for it on every rank. Raises UserError on all if `action` fails. Every rank must
    call it."""
    _training_ranks().on_rank_0(action)


def from_rank_0(make: Callable[[], Any]) -> Any:
    """Return the result of `make` on rank 0, on every rank. Raises UserError on all if it fails. A collective call."""
    return _training_ranks().from_rank_0(make)


def all_gather(value: object) -> list:
    """Return `value` of every rank, on every rank. Every rank must call it."""
    return _training_ranks().all_gather(value)


def first_failure(message: str | None) -> str | None:
    """Return the message of the first rank that has one, on every rank. Every rank must call it."""
    return next((text for text in all_gather(message) if text is not None), None)


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over ranks, in place, and return them. Every rank must call it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def all_max(values: torch.Tensor) -> torch.Tensor:
    """Take the largest of each value over ranks, in place, and return them. Every rank must call it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values
