"""The arithmetic in plain torch, twin by twin with `kernels/fused_adam_kernels`: formula, codecs,
norm, scalars.
"""
