"""Changes to the engine that DeepSpeed builds, so that forward and backward can be captured as a CUDA graph and a step
launches few kernels and waits for the GPU once or twice. Each is one function; numbers and skipped steps stay as they
are."""

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
    if engine.zero_optimization_stage() in (1, 2) and not engine.optimizer.cpu_offload:
        engine.optimizer.check_overflow = lambda partition_gradients=True: None


def compute_norm_in_fp32(engine) -> None:
    """Compute the global norm at stages 1 to 3 in a few kernels, without fp64 copies of the gradients. Offloaded,
    DeepSpeed computes it elsewhere."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0 or (optimizer.offload_optimizer if stage == 3 else optimizer.cpu_offload):
        return

    def grad_norm(gradients, params, norm_type=2) -> torch.Tensor:
        """Return the norm of all ranks' partitions, 0-dim fp32; -1 if it is not finite, as DeepSpeed wants it."""
        square = torch.zeros((), device=engine.device)
        if gradients := list(gradients):
            square += _norm(gradients).square()
        first = next(iter(params), None)  # at stage 3 a parameter knows the ranks that share it
        dist.all_reduce(square, group=getattr(first, "ds_process_group", optimizer.dp_process_group))
        return torch.where(square.isfinite(), square.sqrt(), -1.0)

    optimizer.get_grad_norm_direct = grad_norm


def update_all_weights_at_once(engine) -> None:
    """Update the weights of stage 0 in bf16 by a few kernels, and wait for the GPU once per step.

    DeepSpeed's optimizer asks the GPU about each gradient, and casts, scales and copies tensor by tensor. Its state,
    hence its checkpoints, stay as they are.
    """
    if engine.zero_optimization_stage() > 0 or not engine.bfloat16_enabled():
        return
    optimizer = engine.optimizer
    weights = [weight for group in optimizer.fp16_groups for weight in group]
    masters = [master for group in optimizer.fp32_groups for master in group]

    @torch.no_grad()
    def step(closure=None) -> bool:
        """Clip by the global norm and update. If the norm is not finite, drop the gradients and leave the weights.
        Return whether the step was skipped."""
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        optimizer._global_grad_norm = norm = _norm(gradients)
        optimizer.overflow = not norm.isfinite()
        if optimizer.overflow:
            return optimizer._skip_invalid_grad_norm()
        optimizer._update_scale(False)
        in_fp32 = [torch.empty_like(master) for master in masters]
        torch._foreach_copy_(in_fp32, gradients)
        if optimizer.clip_grad > 0:
            torch._foreach_mul_(in_fp32, (optimizer.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        for master, gradient in zip(masters, in_fp32, strict=True):
            master.grad = gradient
        optimizer.optimizer.step()
        optimizer.optimizer.zero_grad()
        torch._foreach_copy_(weights, masters)
        return False

    optimizer.step = step


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all gradients together, 0-dim fp32."""
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum().sqrt()
