"""Launch Triton kernels, and the sizes of their tiles."""

from functools import cache
from typing import NamedTuple

import torch._C as _C

from ._backend import triton

# Arguments that Triton must not compile anew for: one kernel serves all batches and lengths.
UNSPECIALIZED = [
    "frames", "conditions", "length_count", "repeats", "chunks", "first", "rows", "clips", "elements", "bins", "t_c",
    "t_t",
]  # fmt: skip


class Tile(NamedTuple):
    """The work of one program of a kernel that holds whole rows, in numbers that suit a width of 1024."""

    rows: int  # of 1024 elements at a time; wider rows are taken one by one, by more warps
    warps: int
    stages: int = 1  # steps whose loads are in flight; 1: no pipeline
    chunk: int = 32  # frames per program where it sums over them, and so per partial sum


# Fixed, so that results repeat bit for bit. Assign another one to compare tiles on a GPU.
TILES = {
    "ada_norm_fwd": Tile(2, 4),
    "ada_norm_bwd": Tile(1, 4, 2, 16),
    "gated_residual_fwd": Tile(2, 4),
    "gated_residual_bwd": Tile(1, 4, 2, 16),
    "cosine": Tile(2, 8),
}


def tile_settings(kernel: str, width: int) -> dict[str, int]:
    """Return the launch settings of a kernel's tile for rows of this width: D, BLOCK, ROWS, and num_warps."""
    return _settings(TILES[kernel], width)


@cache
def _settings(tile: Tile, width: int) -> dict[str, int]:
    block, elements = max(16, 1 << (width - 1).bit_length()), 1024 * tile.rows
    rows = min(tile.chunk, max(1, elements // block))
    warps = min(16, tile.warps * max(1, block // elements))
    return {"D": width, "BLOCK": block, "ROWS": rows, "num_warps": warps}


_compiled: dict[tuple, tuple] = {}  # launch of usual arguments -> compiled kernel, and its constants as arguments


def launch(kernel, grid: tuple[int, int, int], tensors: tuple, sizes: tuple, strides: tuple, *scalars, **settings):
    """Start a Triton kernel with the arguments tensors (or None), sizes, strides and scalars, in its order.

    settings: constants and launch options. Triton's own launcher spends more time on finding the compiled kernel than
    on starting it. Where all addresses and strides are multiples of 16, as in training, types and settings alone decide
    which one it is. On a CPU (interpreted, or compiled for a GPU that is not here) Triton's launcher does it all.
    """
    addresses = apart = 0
    types, device = [], -1
    for tensor in tensors:
        if tensor is None:
            types.append(None)
        else:
            addresses |= tensor.data_ptr()
            types.append(tensor.dtype)
            device = tensor.get_device()
    for stride in strides:
        apart |= stride
    arguments = (*tensors, *sizes, *strides, *scalars)
    if device < 0 or (addresses | apart) & 15 or apart >> 31:
        kernel[grid](*arguments, **settings)
        return
    key = (id(kernel), device, *types, *settings.values())
    if key in _compiled:
        compiled, constants = _compiled[key]
        stream, hooks = _C._cuda_getCurrentRawStream(device), triton.knobs.runtime
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler's
            compiled[grid](*arguments, *constants, stream=stream)
        else:
            program = compiled.function, compiled.packed_metadata
            compiled.run(*grid, stream, *program, None, None, None, *arguments, *constants)
    else:
        constants = (None,) * (len(kernel.arg_names) - len(arguments))  # the launcher takes and ignores them
        _compiled[key] = kernel[grid](*arguments, **settings), constants
