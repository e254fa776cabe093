"""Linear layer followed by GELU: y = gelu(x W^T + b), exact (erf) or tanh.

Hendrycks & Gimpel 2016. The released AG-REPA uses the exact form, F5-TTS and CosyVoice 3 the tanh form.

Shapes: x (..., D_in); weight (D_out, D_in); bias (D_out,); y (..., D_out).
"""

import torch
import torch.nn.functional as F

_APPROXIMATE = {"erf": "none", "tanh": "tanh"}


def linear_gelu_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str = "erf"
) -> torch.Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate=_APPROXIMATE[gelu])


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: str = "erf") -> torch.Tensor:
    """gelu(x W^T + b). Raises ValueError for another gelu than erf or tanh."""
    if gelu not in _APPROXIMATE:
        raise ValueError(f"gelu={gelu!r}: erf or tanh")
    return linear_gelu_ref(x, weight, bias, gelu)
