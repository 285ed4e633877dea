"""Triton kernels of fused-adam. Knows torch and triton, never fused_adam; imports nothing, so that
`table` is free.
"""
