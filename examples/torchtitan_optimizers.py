"""Train with torchtitan's optimizers, save, resume: `python examples/torchtitan_optimizers.py`.

Writes checkpoint/ into the current folder.
"""

import torch
from torch import nn
from torch.distributed import checkpoint
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from fused_adam import FusedAdamW


class Container(OptimizersContainer):
    """torchtitan's optimizers, and one more name."""

    @staticmethod
    def _resolve_optimizer_factory(name):
        if name == "FusedAdamW":
            return FusedAdamW
        return OptimizersContainer._resolve_optimizer_factory(name)


def group(pattern, **settings):
    return ParamGroupConfig(
        pattern=pattern, optimizer_name="FusedAdamW", optimizer_kwargs={"lr": 3e-4, **settings}
    )


config = OptimizersContainer.Config(
    param_groups=[group(r"bias$", weight_decay=0.0), group(".*", weight_decay=0.1)],
    optimizer_factory_kwargs_by_name={"FusedAdamW": {"precision": "split32-bf16"}},
)
for resume in (False, True):
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).bfloat16()
    optimizers = Container(config, model_parts=[model])
    state = {"model": model, "optimizers": optimizers}
    if resume:
        checkpoint.load(state, checkpoint_id="checkpoint", no_dist=True)
    for _ in range(5):
        loss = model(torch.randn(4, 8).bfloat16()).square().mean()
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
    print(f"last loss {loss.item():.4f}")
    checkpoint.save(state, checkpoint_id="checkpoint", no_dist=True)
