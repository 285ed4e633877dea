"""Which parameters decay."""

from fused_adam import param_groups


def decayed(module):
    """Names of the parameters that decay."""
    return [
        name
        for group in param_groups(module, 0.1)
        if group["weight_decay"]
        for name, _ in group["params"]
    ]
