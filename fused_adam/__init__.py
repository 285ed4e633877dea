"""FusedAdam and FusedAdamW: torch.optim's Adam and AdamW, one fused pass per step. Imports no
triton.
"""

from .adamw import FusedAdamW
from .groups import param_groups
from .in_backward import step_in_backward
from .optimizer import FusedAdam
from .version import __version__

__all__ = ["FusedAdam", "FusedAdamW", "__version__", "param_groups", "step_in_backward"]
