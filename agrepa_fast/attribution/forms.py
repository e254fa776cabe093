"""The tensors of one call of a block that are rows, which of them is its state, and how its output holds rows."""

from collections.abc import Callable

import torch

from .gate_plan import BlockPlan
from .rows import RowAxis, row_axis
from .states import Tensors, TracedCall, choose_branch, choose_state, updates
from .trees import Path, describe, tensors

NAME_ROWS = "name the arguments that have a row per clip: --row-arguments, row_arguments=... in Python"


class CallForm:
    """The rows, tables and state of one call of a block in a forward of V variants, before and after it has run."""

    name: str  # of the block, for messages
    given: Tensors  # the tensors among its arguments
    rows: dict[Path, RowAxis]  # of those that are sliced
    rows_per_variant: int
    state: Path
    update: Path  # the state, or the branch, in the output
    updates: list[Path]  # all places where it stands
    least_chunk: int = 1

    def rows_to_run(self, plan: BlockPlan) -> int:
        """Return how many variants' rows the block runs."""
        return plan.prefixes

    def called(self, forward: Callable, args: list, kwargs: dict, part: Tensors):
        """Return the block's output. part: the rows among the arguments."""
        return forward(*args, **kwargs)

    def place_outputs(self, returned: Tensors, count: int, check_streams: bool) -> dict[Path, RowAxis]:
        """Return where the outputs of `count` variants hold rows, and set update, updates and state."""
        raise NotImplementedError


class GuessedForm(CallForm):
    """A call about which nothing is known but its arguments: rows are the tensors with V * C of them.

    Raises ValueError, naming block and argument, if that is ambiguous.
    """

    def __init__(self, name: str, kind: str, arguments: dict, variants: int, *, row_arguments, state: str | int | None):
        self.name, self.kind, self.variants, self._named = name, kind, variants, state
        if state is not None and row_arguments is not None:
            chosen = {state, *row_arguments}
            self.given = dict(tensors({key: value for key, value in arguments.items() if key in chosen}))
        else:
            self.given = {path: value for path, value in tensors(arguments) if value.ndim}
        anchor = self._anchor(state)
        rows = self.given[anchor].shape[0]
        if rows % variants:
            raise ValueError(f"{rows} rows for {variants} variants: call the model with variants x clips rows")
        self.rows_per_variant = rows // variants
        if row_arguments is None:
            chosen = self._suspects(anchor, rows)
        else:
            chosen = [path for path in self.given if path[0] in row_arguments]
            if odd := next((path for path in chosen if self.given[path].shape[0] % rows), None):
                shape = tuple(self.given[odd].shape)
                raise ValueError(f"{name}: argument {describe(odd)!r}, {shape}, has no row for each of {rows}")
        self.rows = {path: RowAxis() for path in (anchor, *chosen)}
        self.state = anchor

    def _anchor(self, state: str | int | None) -> Path:
        """Return the tensor that says how many rows there are: the state, else the first that is no vector."""
        if state is not None:
            if found := next((path for path in self.given if path[0] == state or describe(path) == state), None):
                return found
            raise ValueError(f"{self.name} has no tensor {state!r}, but {', '.join(map(describe, self.given))}")
        sequences = [path for path, value in self.given.items() if value.is_floating_point() and value.ndim > 1]
        if not self.given:
            raise ValueError(f"{self.name} was called without a tensor")
        return (sequences or list(self.given))[0]

    def _suspects(self, anchor: Path, rows: int) -> list[Path]:
        suspects = [path for path, value in self.given.items() if path != anchor and value.shape[0] == rows]
        shape = self.given[anchor].shape
        others = [path for path in suspects if self.given[path] is not self.given[anchor]]
        if others and rows in shape[1:] and self.variants > 1:
            raise ValueError(
                f"{self.name}: argument {describe(others[0])!r} has {rows} rows, as has a later dimension of the state "
                f"{tuple(shape)}: name the arguments that are rows in multi_gate(row_arguments=...)"
            )
        return suspects

    def called(self, forward: Callable, args: list, kwargs: dict, part: Tensors):
        self._part = part
        versions = {path: value._version for path, value in part.items() if not value.is_inference()}
        out = forward(*args, **kwargs)
        if self.kind == "block" and any(part[path]._version != version for path, version in versions.items()):
            raise ValueError(
                f"{self.name} changes its input in place: the variants without it would get the changed one"
            )
        return out

    def place_outputs(self, returned: Tensors, count: int, check_streams: bool) -> dict[Path, RowAxis]:
        ins, outs = updates(self._part, returned)
        if self.kind == "branch":
            self.update = choose_branch(self.name, returned, outs)
        else:
            found = choose_state(self.name, self._part, returned, self._named, ins, outs, check_streams)
            self.state, self.update = found
        self.updates = [path for path, value in returned.items() if value is returned[self.update]]
        rows = count * self.rows_per_variant
        have_rows = [path for path, value in returned.items() if value.ndim and value.shape[0] == rows]
        return {path: RowAxis() for path in {self.update: None, **dict.fromkeys(have_rows)}}


class TracedForm(CallForm):
    """A call that is known from a plain forward of C rows: rows are the tensors that grow with the variants.

    Raises ValueError, naming block and argument, if an argument or an output does not hold, for the whole model, the
    rows that it had alone.
    """

    def __init__(self, call: TracedCall, kind: str, arguments: dict, variants: int, clips: int, row_arguments):
        self.name, self.kind, self.variants, self.clips, self._call = call.name, kind, variants, clips, call
        self.given, self.state = dict(tensors(arguments)), call.state
        if self.given.keys() != call.inputs.keys():
            other = describe(next(iter(self.given.keys() ^ call.inputs.keys())))
            raise ValueError(f"{self.name}: argument {other!r} is not the same with the rows of several variants")
        self.rows = {call.state: RowAxis()} if kind == "block" and variants == 1 else {}
        for path, value in self.given.items() if variants > 1 else ():
            may_be_row = row_arguments is None or path == call.state or path[0] in row_arguments
            if may_be_row and (axis := self._axis(path, call.inputs[path], value)) is not None:
                self.rows[path] = axis
        if kind == "block" and call.state not in self.rows:
            raise ValueError(f"{self.name}: its state {describe(call.state)!r} has no row per clip")
        self.rows_per_variant = clips
        if kind == "block":
            self.rows_per_variant = call.inputs[call.state].shape[self.rows[call.state].dim]
        self.least_chunk = 2 if len(call.outputs) > 1 or kind == "branch" else 1

    def _axis(self, path: Path, alone: torch.Tensor, value: torch.Tensor) -> RowAxis | None:
        try:
            return row_axis(alone, value, self.variants, self.clips)
        except ValueError as error:
            raise ValueError(
                f"{self.name}: its argument {describe(path)!r} {error} (rows depend on each other outside of the "
                f"blocks, or on chance); if it has no rows to gate, {NAME_ROWS}"
            ) from error

    def rows_to_run(self, plan: BlockPlan) -> int:
        """Return at least two where the outputs' rows are told by how they grow."""
        return max(plan.prefixes, min(self.least_chunk, self.variants))

    def called(self, forward: Callable, args: list, kwargs: dict, part: Tensors):
        try:
            return forward(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.variants == 1:
                raise
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.name} runs alone, but not with the rows of several variants ({type(error).__name__}: "
                f"{reason}); {NAME_ROWS}"
            ) from error

    def place_outputs(self, returned: Tensors, count: int, check_streams: bool) -> dict[Path, RowAxis]:
        call = self._call
        if returned.keys() != call.outputs.keys():
            other = describe(("output", *next(iter(returned.keys() ^ call.outputs.keys()))))
            raise ValueError(f"{self.name}: its {other} is not the same with the rows of several variants")
        self.update = call.update
        self.updates = [path for path, value in returned.items() if value is returned[self.update]]
        if self.variants == 1:
            return {self.update: RowAxis()}
        if count == 1:
            return {self.update: self.rows[self.state]}
        axes = {}
        for path, value in returned.items():
            try:
                axis = row_axis(call.outputs[path], value, count, self.clips)
            except ValueError as error:
                raise ValueError(
                    f"{self.name} cannot be gated exactly: its {describe(('output', *path))} {error}: its rows depend "
                    "on each other (attention across clips, statistics of the batch), on chance (dropout left on), or "
                    "on state kept between calls"
                ) from error
            if axis is not None:
                axes[path] = axis
        if self.update not in axes:
            raise ValueError(f"{self.name}: its output has no row per clip")
        return axes
