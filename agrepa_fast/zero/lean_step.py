"""Changes to the engine that DeepSpeed builds, so that forward and backward can be captured as a CUDA graph and a step
launches few kernels. Each is one function; numbers and skipped steps stay as they are."""

import torch
import torch.distributed as dist


def detach_fragments(engine) -> None:
    """Let backward be captured at stages 1 and 2.

    DeepSpeed keeps a view of each parameter, `lp_fragment`, whose autograd graph holds the parameter's AccumulateGrad
    node on the default stream. A backward inside a capture would wait for that stream, which CUDA refuses. The detached
    view shares the parameter's memory.
    """
    for parameter in engine.module.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            mapping.lp_fragment = mapping.lp_fragment.detach()


def skip_overflow_pass(engine) -> None:
    """Let the global norm alone find gradients that are not finite, at stages 1 and 2.

    In bf16, DeepSpeed also searches each gradient for them before it computes the norm: 14 small kernels per parameter.
    Its step takes an invalid norm, which is -1 on all ranks, as an overflow. Offloaded, the search costs the GPU
    nothing, and it stays.
    """
    if _has_flat_partitions(engine):
        engine.optimizer.check_overflow = lambda partition_gradients=True: None


def compute_norm_in_fp32(engine) -> None:
    """Compute the global norm at stages 1 and 2 in a few kernels, without fp64 copies of the gradients."""
    if not _has_flat_partitions(engine):
        return
    optimizer = engine.optimizer

    def grad_norm(gradients, params, norm_type=2) -> torch.Tensor:
        """Return the norm of all ranks' partitions, 0-dim fp32; -1 if it is not finite, as DeepSpeed wants it."""
        square = torch.zeros((), device=engine.device)
        if gradients := list(gradients):
            square += torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
        dist.all_reduce(square, group=optimizer.dp_process_group)
        return torch.where(square.isfinite(), square.sqrt(), -1.0)

    optimizer.get_grad_norm_direct = grad_norm


def _has_flat_partitions(engine) -> bool:
    return engine.zero_optimization_stage() in (1, 2) and not engine.optimizer.cpu_offload
