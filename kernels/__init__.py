"""The fused operations, one per file, each with its plain-PyTorch reference. Import name: agrepa_fast.kernels.

transformers and diffusers import any `kernels` on sys.path, and an exception there would break them. Under another name
this file defines nothing.
"""

if __name__ == "agrepa_fast.kernels":
    from ._backend import BACKENDS, active_backend, force_backend
    from ._native import native_isa
    from ._rows import valid_frames
    from .ada_norm import ada_norm
    from .align_loss import align_loss, align_loss_sum
    from .flow_mix import flow_mix, philox_normal, philox_uniform
    from .frame_loss import frame_loss_sum
    from .gated_residual import gated_residual
    from .linear_gelu import linear_gelu
    from .qk_norm_rope import qk_norm_rope
    from .velocity_change import velocity_change

    __all__ = [
        "BACKENDS",
        "active_backend",
        "ada_norm",
        "align_loss",
        "align_loss_sum",
        "flow_mix",
        "force_backend",
        "frame_loss_sum",
        "gated_residual",
        "linear_gelu",
        "native_isa",
        "philox_normal",
        "philox_uniform",
        "qk_norm_rope",
        "valid_frames",
        "velocity_change",
    ]
