"""torchtitan's OptimizersContainer: param groups by name, distributed checkpoints of its flat
state_dict, its schedulers, and its hook that makes moments in bfloat16.
"""

import pytest
import torch
from recipes import dtype_of
from torch import nn
from torch.distributed import checkpoint
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)
from torchtitan.components.optimizer.utils import (
    get_flat_optim_state_dict,
    init_optim_state,
    load_flat_optim_state_dict,
)
from training import results, same_bits

from fused_adam import FusedAdamW
from fused_adam.precision import NAMES

STEPS, SAVED, LR = 6, 3, 1e-2


class Container(OptimizersContainer):
    """torchtitan's container, which knows one more optimizer by name."""

    @staticmethod
    def _resolve_optimizer_factory(name):
        if name == "FusedAdamW":
            return FusedAdamW
        return OptimizersContainer._resolve_optimizer_factory(name)


class Run:
    """A model with its optimizers and schedulers, as torchtitan's trainer makes them."""

    def __init__(self, dtype, options, implementation="fused", parts=1):
        torch.manual_seed(0)
        self.parts = [
            nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 6)).to(dtype)
            for _ in range(parts)
        ]
        self.dtype = dtype
        config = OptimizersContainer.Config(
            implementation=implementation,
            param_groups=[
                ParamGroupConfig(
                    pattern=pattern,
                    optimizer_name="FusedAdamW",
                    optimizer_kwargs={"lr": LR, "weight_decay": weight_decay},
                )
                for pattern, weight_decay in ((r"bias$", 0.0), (".*", 0.1))
            ],
            optimizer_factory_kwargs_by_name={"FusedAdamW": options},
        )
        self.container = Container(config, model_parts=self.parts)
        self.schedulers = LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.container, training_steps=STEPS
        )

    def train(self, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            batch = torch.randn(8, 6, generator=generator).to(self.dtype)
            for part in self.parts:
                batch = part(batch)
            batch.square().mean().backward()
            self.container.step()
            self.schedulers.step()
            self.container.zero_grad()
        return self

    def results(self):
        return [entry for optimizer in self.container for entry in results(optimizer)]

    def state(self):
        models = {str(i): part.state_dict() for i, part in enumerate(self.parts)}
        return {"models": models, "optimizer": self.container, "scheduler": self.schedulers}


CASES = [
    (torch.float32, {}),
    (torch.float32, {"flatten": True}),
    (torch.float32, {"amsgrad": True}),
    *((dtype_of(name), {"precision": name, "seed": 3}) for name in NAMES),
]


@pytest.mark.parametrize(("dtype", "options"), CASES, ids=str)
def test_resuming_from_a_distributed_checkpoint(dtype, options, tmp_path):
    """Weights and state have the bits of a training that was never stopped, in every recipe."""
    whole = Run(dtype, options).train(0, STEPS)
    first = Run(dtype, options).train(0, SAVED)
    checkpoint.save(first.state(), checkpoint_id=tmp_path / "saved", no_dist=True)
    rest = Run(dtype, options)
    checkpoint.load(rest.state(), checkpoint_id=tmp_path / "saved", no_dist=True)
    rest.train(SAVED, STEPS)
    assert same_bits(rest.results(), whole.results())
    assert all(entry["step"] == STEPS for entry in rest.results())


def test_two_model_parts_are_two_optimizers():
    """Of pipeline stages: each optimizer loads its own part."""
    whole = Run(torch.float32, {}, parts=2)
    assert len(whole.container) == 2 and all(type(each) is FusedAdamW for each in whole.container)
    assert [group["weight_decay"] for group in whole.container.optimizers[1].param_groups] == [
        0.0,
        0.1,
    ]


def test_state_is_made_without_a_change_to_the_weights():
    run, untouched = Run(torch.float32, {}), Run(torch.float32, {})
    [optimizer], [other] = run.container, untouched.container
    init_optim_state(optimizer)
    flat = get_flat_optim_state_dict(optimizer)
    for name in ("0.weight", "2.bias"):
        assert (
            not flat[f"state.{name}.exp_avg"].any() and not flat[f"state.{name}.exp_avg_sq"].any()
        )
    assert same_bits(
        [{"param": param.detach()} for param in run.parts[0].parameters()],
        [{"param": param.detach()} for param in untouched.parts[0].parameters()],
    )
    init_optim_state(other)
    load_flat_optim_state_dict(other, flat)
    assert same_bits(results(other), results(optimizer))


BF16_STATES = "fused_opt_states_bf16"  # the hook makes bfloat16 moments before the first step


def test_moments_that_the_hook_makes_stay_bfloat16(tmp_path):
    """They are those of the recipe native-bf16, also after a checkpoint."""
    whole = Run(torch.float32, {"seed": 3}, BF16_STATES).train(0, STEPS)
    named = Run(torch.float32, {"precision": "native-bf16", "seed": 3}).train(0, STEPS)
    assert same_bits(whole.results(), named.results())
    assert {entry["exp_avg"].dtype for entry in whole.results()} == {torch.bfloat16}
    first = Run(torch.float32, {"seed": 3}, BF16_STATES).train(0, SAVED)
    checkpoint.save(first.state(), checkpoint_id=tmp_path / "saved", no_dist=True)
    rest = Run(torch.float32, {"seed": 3}, BF16_STATES)
    checkpoint.load(rest.state(), checkpoint_id=tmp_path / "saved", no_dist=True)
    assert same_bits(rest.train(SAVED, STEPS).results(), whole.results())


def test_a_recipe_that_stores_other_moments_refuses_the_hooks():
    with pytest.raises(ValueError, match="'exp_avg', which its precision does not store"):
        Run(torch.bfloat16, {"precision": "split24-int8"}, BF16_STATES).train(0, 1)
