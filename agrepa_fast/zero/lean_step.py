"""Changes to the engine that DeepSpeed builds, so that forward and backward can be captured as a CUDA graph and a step
launches few kernels. Each is one function; numbers and skipped steps stay as they are."""


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
