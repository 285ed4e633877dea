"""Who runs a plan: the Triton kernels, or the same formula in plain torch."""
