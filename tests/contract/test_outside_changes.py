"""Changes from outside between steps: of state, data, dtype, device and memory format."""

import gc
import weakref

import pytest
import torch
from next_to_torch import BACKENDS, FLATTEN, close, pair
from torch import nn
from training import parameters, results, same_bits, train, values

from fused_adam import FusedAdam


@pytest.mark.parametrize(
    "how", ["replaced", "data", "filled", "removed", "cleared", "step", "step number"]
)
def test_state_changed_by_the_user_is_honoured(how):
    a, b = pair()
    for optimizer in (a, b):
        train(optimizer, 2)
        param = optimizer.param_groups[0]["params"][0]
        entry = optimizer.state[param]
        if how == "replaced":
            entry["exp_avg"] = torch.full((5,), 0.5)
        elif how == "data":
            entry["exp_avg_sq"].data = torch.full((5,), 0.5)
        elif how == "filled":
            entry["exp_avg"].fill_(0.25)
        elif how == "removed":
            del optimizer.state[param]
        elif how == "cleared":
            optimizer.state.clear()
        elif how == "step":
            entry["step"].fill_(100)
        else:
            entry["step"] = torch.tensor(100.0)
        train(optimizer, 2)
        if how.startswith("step"):
            entry["step"].sub_(90)  # through a reference kept from before
            train(optimizer, 2)
    close(a, b)


@pytest.mark.parametrize("flatten", FLATTEN)
def test_a_counter_written_through_a_kept_reference_is_honoured(flatten):
    """Rows that were stepped as one part when their counts do."""
    a, b = pair(flatten=flatten)
    for optimizer in (a, b):
        train(optimizer, 2)
        step = optimizer.state[optimizer.param_groups[0]["params"][1]]["step"]
        train(optimizer, 1)
        step.fill_(50)
        train(optimizer, 2)
    assert [r["step"].item() for r in results(a)] == [5, 52]
    close(a, b)


@pytest.mark.parametrize("flatten", FLATTEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_swapped_data_is_noticed(backend, flatten):
    """The step writes where the parameter is now, and nothing where it was."""
    a, b = pair(backend=backend, flatten=flatten)
    old = []
    for optimizer in (a, b):
        train(optimizer, 2)
        param = optimizer.param_groups[0]["params"][1]
        old.append(param.data)
        param.data = torch.full((3, 4), 0.5)
        train(optimizer, 2)
    close(a, b)
    torch.testing.assert_close(*old)


@pytest.mark.parametrize("precision", [None, "native-bf16", "native-int8"])
@pytest.mark.parametrize("flatten", FLATTEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_changes_its_memory_format_takes_its_state_along(backend, flatten, precision):
    """Moments keep to the elements they belong to, whose order in memory is another one now."""
    model = nn.Conv2d(3, 4, 5)
    optimizer = FusedAdam(
        model.parameters(), lr=0.1, backend=backend, flatten=flatten, precision=precision
    )
    train(optimizer, 2)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        model.to(memory_format=memory_format)
        optimizer.zero_grad(set_to_none=True)
        expected = FusedAdam(
            [p.detach().clone().requires_grad_() for p in model.parameters()], precision=precision
        )
        expected.load_state_dict(optimizer.state_dict())
        train(optimizer, 2, first=2)
        train(expected, 2, first=2)
        assert same_bits(results(optimizer), results(expected))
        weight = optimizer.state[model.weight]
        moment = weight.get("exp_avg", weight.get("exp_avg_ratio"))
        assert moment.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_lies_on_another_device_moves_to_the_parameters(backend):
    """As after `model.to(device)`. Here is one device, so the state claims to be elsewhere."""
    optimizer, plain = (
        FusedAdam(parameters(torch.float32, [(5,), (3, 4)]), backend=backend) for _ in range(2)
    )
    train(optimizer, 2)
    params = optimizer.param_groups[0]["params"]
    before = [optimizer.state[p]["exp_avg"] for p in params]
    for p in params:
        home = optimizer._engine.arena.param_states[p]
        home.layout = (torch.device("meta"), home.layout[1])
        p.data = p.data.clone()
    train(optimizer, 2, first=2)
    train(plain, 4)
    assert same_bits(results(optimizer), results(plain))
    assert all(
        optimizer.state[p]["exp_avg"].data_ptr() != old.data_ptr()
        for p, old in zip(params, before, strict=True)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("flatten", FLATTEN)
def test_a_model_that_moves_to_the_gpu_takes_its_state_along(flatten):
    models = [nn.Linear(5, 3), nn.Linear(5, 3)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [FusedAdam(model.parameters(), flatten=flatten) for model in models]
    for optimizer in optimizers:
        train(optimizer, 2)
    models[0].to("cuda")
    optimizers[0].zero_grad()
    for optimizer in optimizers:
        train(optimizer, 2, first=2)
    assert all(value.is_cuda for entry in optimizers[0].state.values() for value in entry.values())
    assert same_bits(*map(results, optimizers))


@pytest.mark.parametrize("flatten", FLATTEN)
def test_swapped_tensors_are_noticed(flatten):
    a, b = pair(flatten=flatten)
    for optimizer in (a, b):
        train(optimizer, 2)
        param = optimizer.param_groups[0]["params"][1]
        torch.utils.swap_tensors(param, nn.Parameter(torch.full((3, 4), 0.5)))
        train(optimizer, 2)
    close(a, b)


@pytest.mark.parametrize("flatten", FLATTEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_changes_its_dtype_takes_its_state_along(backend, flatten):
    """torch keeps the moments in the old dtype and then refuses to step."""
    model = nn.Linear(4, 3)
    optimizer = FusedAdam(model.parameters(), backend=backend, flatten=flatten)
    train(optimizer, 2)
    before = results(optimizer)
    model.to(torch.bfloat16)
    optimizer.zero_grad(set_to_none=True)
    expected = FusedAdam([p.detach().clone().requires_grad_() for p in model.parameters()])
    expected.load_state_dict(optimizer.state_dict())
    train(optimizer, 1, first=2)
    train(expected, 1, first=2)
    assert same_bits(results(optimizer), results(expected))
    assert {r["exp_avg"].dtype for r in results(optimizer)} == {torch.bfloat16}
    assert [r["step"].item() for r in results(optimizer)] == [3, 3] and before[0][
        "exp_avg"
    ].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_another_dtype_at_the_same_address_is_noticed(backend):
    memory = torch.zeros(64, dtype=torch.uint8)
    runs = []
    for shared in (True, False):
        param = parameters(torch.float32, [(8,)])[0]
        param.grad_dtype = None
        optimizer = FusedAdam([param], lr=0.1, backend=backend)
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            room = memory if shared else torch.zeros(64, dtype=torch.uint8)
            grad = room[: 8 * dtype.itemsize].view(dtype)
            param.grad = grad.copy_(values((8,), 5, dtype))
            optimizer.step()
        runs.append(results(optimizer))
    assert same_bits(*runs)


def test_a_parameter_taken_out_is_let_go():
    """Its memory is not held: some frameworks replace parameters in their groups."""
    params = parameters(torch.float32, [(5,), (6,)])
    optimizer = FusedAdam(params)
    train(optimizer, 1)
    old = weakref.ref(params[1])
    optimizer.state.pop(params[1])
    optimizer.param_groups[0]["params"][1] = params[1] = nn.Parameter(torch.ones(6))
    train(optimizer, 1)
    gc.collect()
    assert old() is None and optimizer.state[params[1]]["step"] == 1
