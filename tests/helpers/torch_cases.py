"""Every configuration of torch's optimizer database, for both of our classes."""

import pytest
import torch
from class_pairs import PAIRS
from torch.testing._internal.common_optimizers import (
    optim_inputs_func_adam,
    optim_inputs_func_adamw,
)

from fused_adam import FusedAdam, FusedAdamW

FP32 = torch.float32
SHAPES = [(10, 5), (10,), ()]

# Configurations with tensors for betas are the database's for GPUs; our classes step them on a CPU.
DATABASE = {FusedAdam: optim_inputs_func_adam("cuda"), FusedAdamW: optim_inputs_func_adamw("cuda")}
CASES = [
    pytest.param(
        ours,
        theirs,
        configuration.kwargs,
        flatten,
        id=f"{ours.__name__}-{configuration.desc}{'-flatten' if flatten else ''}",
    )
    for ours, theirs in PAIRS
    for configuration in DATABASE[ours]
    for flatten in (False, True)
]
every_case = pytest.mark.parametrize(("ours", "theirs", "kwargs", "flatten"), CASES)
