"""ONNX files, run by onnxruntime on the CPU."""

from pathlib import Path

from ..errors import UserError


def open_session(title: str, path: Path, extra: str):
    """Return the session of an ONNX file. Raises UserError for a file of another kind, and, beginning with `title` and
    naming the `extra` to install, without onnxruntime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{title} needs onnxruntime ({error}): pip install 'agrepa_fast[{extra}]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # clips run beside each other
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(
            f"{path} is no ONNX file that onnxruntime reads: {' '.join(str(error).split())[:200]}"
        ) from error
