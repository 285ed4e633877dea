"""PEFT's LoRA: adapters train, the frozen base is neither moved nor given state; saved, loaded and
merged.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import llama, loss_of
from training import results, same_bits

from bench.harness.oracle import Options, tolerance
from fused_adam import FusedAdamW

STEPS, LR = 4, 1e-2
ADAPTED = ["q_proj", "v_proj"]


def adapted(dtype=torch.float32):
    # PEFT makes adapters in float32 and leaves the base as it is.
    config = LoraConfig(r=4, target_modules=ADAPTED, init_lora_weights=False, lora_dropout=0.1)
    return get_peft_model(llama(dtype), config)


def trained(optimizer_class=FusedAdamW, dtype=torch.float32, **options):
    model = adapted(dtype)
    optimizer = optimizer_class(model.parameters(), lr=LR, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return model, optimizer


def split(model):
    """Named parameters: those of adapters, and those of the base."""
    named = dict(model.named_parameters())
    adapters = {name: param for name, param in named.items() if "lora_" in name}
    return adapters, {name: param for name, param in named.items() if name not in adapters}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flatten", [False, True])
def test_only_adapters_train(flatten, dtype):
    untouched = split(adapted(dtype))
    model, optimizer = trained(dtype=dtype, flatten=flatten)
    adapters, base = split(model)
    assert same_bits([base], [untouched[1]])
    assert not any(torch.equal(param, untouched[0][name]) for name, param in adapters.items())
    assert set(optimizer.state) == set(adapters.values())
    assert all(param.grad is None for param in base.values())
    if flatten:
        assert set(optimizer._engine.flat.flat_params) == set(adapters.values())
    assert same_bits(results(optimizer), results(trained(dtype=dtype)[1]))


def test_near_torch():
    ours, theirs = (split(trained(cls)[0])[0] for cls in (FusedAdamW, torch.optim.AdamW))
    atol = tolerance(torch.float32, STEPS, Options(lr=LR, weight_decay=0.01), roundings=4)["param"]
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=atol)


@torch.no_grad()
def merged(model):
    """The base's weights, plus what the adapters of this model add to them."""
    weights = llama().state_dict()
    for index, layer in enumerate(model.base_model.model.model.layers):
        for name in ADAPTED:
            delta = getattr(layer.self_attn, name).get_delta_weight("default")
            weights[f"model.layers.{index}.self_attn.{name}.weight"] += delta
    return weights


@pytest.mark.parametrize("flatten", [False, True])
def test_adapters_are_saved_loaded_and_merged(flatten, tmp_path):
    model, _ = trained(flatten=flatten)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert same_bits([split(loaded)[0]], [split(model)[0]])
    expected = merged(model)
    assert same_bits([model.merge_and_unload().state_dict()], [expected])
    assert same_bits([loaded.merge_and_unload().state_dict()], [expected])
    assert not same_bits([expected], [llama().state_dict()])
