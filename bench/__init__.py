"""The benchmark command `fused-adam-bench`. It uses fused_adam's public names only; nothing imports
it.
"""
