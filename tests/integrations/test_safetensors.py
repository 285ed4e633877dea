"""safetensors and save_pretrained of models whose parameters lie in flat buffers, and of optimizer
state.
"""

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from tiny import gpt2, llama, loss_of
from training import results, same_bits

from fused_adam import FusedAdamW

RECIPES = [
    ({}, torch.float32),
    ({"amsgrad": True}, torch.bfloat16),
    ({"precision": "split32"}, torch.bfloat16),
    ({"precision": "split24-int8"}, torch.bfloat16),
    ({"precision": "master32"}, torch.bfloat16),
]


def steps(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def trained(model, **options):
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, flatten=True, **options)
    steps(model, optimizer, 0, 3)
    assert all(place.holds(param) for param, place in optimizer._engine.flat.flat_params.items())
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [gpt2, llama])
def test_save_pretrained(make, dtype, tmp_path):
    model = make(dtype)
    trained(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert same_bits([loaded.state_dict()], [model.state_dict()])
    # Every weight once: views of one buffer are not written as the buffer.
    held = sum(param.nbytes for param in model.parameters())
    assert held <= (tmp_path / "model.safetensors").stat().st_size < held + 10_000


@pytest.mark.parametrize("make", [gpt2, llama])  # with tied weights, and without
def test_save_model(make, tmp_path):
    model, other = make(), make()
    trained(model)
    trained(other)
    save_model(model, str(tmp_path / "model"))
    with torch.no_grad():
        for param in other.parameters():
            param.zero_()
    assert load_model(other, tmp_path / "model") == (set(), [])
    assert same_bits([other.state_dict()], [model.state_dict()])


def test_save_file_of_a_state_dict(tmp_path):
    model = llama()
    trained(model)
    save_file(model.state_dict(), tmp_path / "model")
    assert same_bits([load_file(tmp_path / "model")], [model.state_dict()])


@pytest.mark.parametrize(("options", "dtype"), RECIPES, ids=str)
def test_save_file_of_optimizer_state(options, dtype, tmp_path):
    """Each entry has a storage of its own; model and optimizer loaded from files go on as if never
    stopped.
    """
    model, other = llama(dtype), llama(dtype)
    optimizer = trained(model, **options)
    saved = optimizer.state_dict()
    flat = {
        f"{index}.{key}": value
        for index, entry in saved["state"].items()
        for key, value in entry.items()
    }
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in flat.values())
    save_file(flat, tmp_path / "state")
    save_file(model.state_dict(), tmp_path / "model")

    state = {index: {} for index in saved["state"]}
    for name, value in load_file(tmp_path / "state").items():
        index, key = name.split(".")
        state[int(index)][key] = value
    other.load_state_dict(load_file(tmp_path / "model"))
    resumed = FusedAdamW(other.parameters(), flatten=True, **options)
    resumed.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    assert same_bits(results(resumed), results(optimizer))
    steps(model, optimizer, 3, 6)
    steps(other, resumed, 3, 6)
    assert same_bits(results(resumed), results(optimizer))
