"""Repair bfloat16 in Triton's interpreter (TRITON_INTERPRET=1, Triton 3.6 to 3.9). _backend loads this file only then.

The interpreter keeps bf16 as the 16 bits in a numpy uint16. Unpatched, it truncates fp32 to bf16 instead of rounding,
computes on the raw bits, and fails at `range(runtime value)` with numpy 2.4. Patched, it rounds to nearest even, as a
GPU does, and computes in fp32. Reductions of bf16 raise an error, since kernels cast to fp32 first.
"""

import numpy as np


def widen(bits: np.ndarray) -> np.ndarray:
    """Return bf16 bits (uint16) as fp32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Return fp32 values as bf16 bits (uint16), rounded to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def patch() -> None:
    """Patch the interpreter; a second call does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "patched_by_agrepa", False):
        return
    builder.patched_by_agrepa = True

    def is_bf16(value) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def to_fp32(value):
        return handle(widen(value.data), tl.float32) if is_bf16(value) else value

    def to_bf16(value):
        return handle(narrow(value.data), tl.bfloat16)

    cast, to_fp = builder.cast_impl, builder.create_fp_to_fp
    binary, unary, dot = builder.binary_op, builder.unary_op, builder.create_dot
    comparisons = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}

    def cast_impl(self, source, target):
        scalar = target.scalar
        if is_bf16(source) and scalar != tl.bfloat16:
            values = widen(source.data)
            return handle(values if scalar == tl.float32 else values.astype(interpreter._get_np_dtype(scalar)), scalar)
        if scalar == tl.bfloat16 and not is_bf16(source):
            return to_bf16(handle(source.data.astype(np.float32), tl.float32))
        return cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32 and nearest:
            return to_bf16(source)
        return to_fp(self, source, target, rounding)

    def binary_op(self, left, right, function):
        bf16 = is_bf16(left)
        result = binary(self, to_fp32(left), to_fp32(right), function)
        if function in comparisons:
            return handle(result.data.astype(bool), tl.int1)
        return to_bf16(result) if bf16 else result

    def unary_op(self, value, function):
        return to_bf16(unary(self, to_fp32(value), function)) if is_bf16(value) else unary(self, value, function)

    def create_dot(self, a, b, accumulator, *rest):
        return dot(self, to_fp32(a), to_fp32(b), accumulator, *rest)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.binary_op, builder.unary_op, builder.create_dot = binary_op, unary_op, create_dot
    builder.get_bf16 = lambda self, value: handle(narrow(np.array([value])), tl.bfloat16)
    for name in ("sum", "min_max"):
        setattr(interpreter.ReduceOps, name, _refuse_bf16(getattr(interpreter.ReduceOps, name), tl.bfloat16))
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)


def _refuse_bf16(reduce, bf16):
    def checked(self, value, *rest, **options):
        first = value[0] if isinstance(value, tuple) else value
        if first.dtype == bf16:
            raise TypeError("a reduction of bf16: cast the tile to tl.float32 first")
        return reduce(self, value, *rest, **options)

    return checked


def _with_index(patch_tensor):
    """Give tensors __index__ for range(runtime value): numpy 2.4 no longer converts one-element arrays to int."""

    def patched(tensor, scope, *rest):
        patch_tensor(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))

    return patched
