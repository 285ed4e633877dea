"""FusedAdam and FusedAdamW: torch.optim's Adam and AdamW, one fused pass per step. Imports no triton."""

from .groups import param_groups
from .optimizer import FusedAdam, FusedAdamW
from .release import step_in_backward
from .version import __version__

__all__ = ["FusedAdam", "FusedAdamW", "__version__", "param_groups", "step_in_backward"]
