"""Calls for which the host waits for a GPU, noted with their places. On a CPU they can be counted."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGES = ("agrepa_fast", "deepspeed")
# Operations whose result, or its size, the host reads: `item`, `bool`, `float` and `int` are _local_scalar_dense.
READ = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")  # by a mask they need its nonzero elements
COPIES = ("cpu", "numpy", "tolist", "to", "cuda")
CREATIONS = ("tensor", "as_tensor", "asarray")  # on a device, of numbers that are on the host


@contextmanager
def waits() -> Iterator[Counter]:
    """Inside, count the calls for which the host would wait for a GPU, by "module function: call". The place is the
    innermost of our modules and DeepSpeed's."""
    from deepspeed.accelerator import get_accelerator

    found = Counter()

    def note(call: str) -> None:
        found[f"{_place()}: {call}"] += 1

    with ExitStack() as inside:
        for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream, type(get_accelerator())):
            waiting = mock.Mock(side_effect=lambda *_: note("synchronize"))
            inside.enter_context(mock.patch.object(owner, "synchronize", waiting))
        inside.enter_context(_Functions(note))
        inside.enter_context(_Operations(note))
        yield found


class _Functions(TorchFunctionMode):
    """Notes copies from a device and to it, which are no operations on a CPU, where our modules and DeepSpeed's ask for
    them. torch's own ask for copies to where a tensor is."""

    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if _package(sys._getframe(1)) not in PACKAGES:
            return function(*args, **kwargs)
        if name in COPIES and not kwargs.get("non_blocking"):
            names_device = any(isinstance(value, torch.device | str) for value in (*args[1:], *kwargs.values()))
            if name != "to" or names_device:
                self.note(name)
        if name in CREATIONS and kwargs.get("device") is not None and not isinstance(args[0], torch.Tensor):
            self.note(name)
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Notes operations that the host waits for, also where other operations call them."""

    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name in READ:
            self.note("item" if name == "_local_scalar_dense" else name)
        elif name in INDEXING:
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                self.note("mask")
        elif function.name() == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is None:
            self.note("repeat_interleave")
        return function(*args, **kwargs)


def _place() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        if _package(frame) in PACKAGES:
            return f"{frame.f_globals['__name__']} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _package(frame) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
