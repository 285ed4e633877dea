"""Checkpoints: torch's form, exact resumption, exchange with torch.optim both ways."""

import copy
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # says how ForkingPickler sends tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import parameters, results, same_bits, through_a_file, train

from fused_adam import FusedAdam, FusedAdamW

FLATTEN = [False, True]
SHAPES = [(5,), (3, 4), (), (200,)]


def copies(optimizer):
    return [p.detach().clone().requires_grad_() for p in optimizer.param_groups[0]["params"]]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("backend", ["reference", "compiled", "triton"])
@pytest.mark.parametrize("flatten", FLATTEN)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_resuming_is_bit_equal_to_not_having_stopped(amsgrad, flatten, backend, dtype):
    options = {"lr": 1e-2, "amsgrad": amsgrad, "flatten": flatten, "backend": backend}
    optimizer = FusedAdamW(parameters(dtype, SHAPES), **options)
    train(optimizer, 3)
    resumed = FusedAdamW(copies(optimizer), **{**options, "lr": 7.0})
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same_bits(results(resumed), results(optimizer))
    train(optimizer, 2, first=3)
    train(resumed, 2, first=3)
    assert same_bits(results(resumed), results(optimizer))
    assert resumed.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"fused": True}, {"weight_decay": 0.1, "maximize": True}],
    ids=str,
)
@pytest.mark.parametrize("flatten", FLATTEN)
@pytest.mark.parametrize(
    ("ours", "theirs"), [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)]
)
def test_exchange_with_torch_in_mid_training(ours, theirs, flatten, options):
    """Same keys in the same order, same dtypes and shapes; each continues from the other's
    checkpoint.
    """
    a = ours(parameters(torch.float32, SHAPES), flatten=flatten, **options)
    b = theirs(parameters(torch.float32, SHAPES), **options)
    for optimizer in (a, b):
        train(optimizer, 3)
    sa, sb = through_a_file(a.state_dict()), through_a_file(b.state_dict())
    assert sa["param_groups"] == sb["param_groups"] and list(sa["param_groups"][0]) == list(
        sb["param_groups"][0]
    )
    for index in sb["state"]:
        assert list(sa["state"][index]) == list(sb["state"][index])
        for key, value in sb["state"][index].items():
            mine = sa["state"][index][key]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
    from_ours, from_theirs = (
        theirs(copies(a), **options),
        ours(copies(b), flatten=flatten, **options),
    )
    from_ours.load_state_dict(sa)
    from_theirs.load_state_dict(sb)
    assert same_bits(results(from_ours), results(a)) and same_bits(results(from_theirs), results(b))
    for optimizer in (a, b, from_ours, from_theirs):
        train(optimizer, 2, first=3)
    for x, y in ((from_ours, a), (from_theirs, b)):
        for got, want in zip(results(x), results(y), strict=True):
            assert got["step"] == want["step"] == 5
            for key in got:
                torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-6)


def test_steps_in_a_checkpoint_are_tensors_of_their_own():
    """A step tensor shared by all entries would be advanced once per parameter by torch.optim."""
    optimizer = FusedAdam(parameters(torch.float32, SHAPES))
    train(optimizer, 2)
    entries = optimizer.state_dict()["state"].values()
    steps = [entry["step"] for entry in entries]
    assert len({step.untyped_storage().data_ptr() for step in steps}) == len(SHAPES)
    assert all(step.untyped_storage().nbytes() == 4 and step == 2 for step in steps)
    live = {optimizer.state[p]["step"].data_ptr() for p in optimizer.param_groups[0]["params"]}
    assert not live & {step.data_ptr() for step in steps}


def test_loading_does_not_alias_the_checkpoint():
    a = FusedAdam(parameters(torch.float32, SHAPES))
    train(a, 2)
    checkpoint = copy.deepcopy(a.state_dict())
    before = copy.deepcopy(checkpoint)
    b = FusedAdam(copies(a))
    b.load_state_dict(checkpoint)
    train(b, 2)
    for index, entry in before["state"].items():
        assert all(
            torch.equal(checkpoint["state"][index][key], value) for key, value in entry.items()
        )


def test_loading_does_not_alias_the_groups_of_the_checkpoint():
    checkpoint = FusedAdam(parameters(torch.float32, SHAPES), lr=torch.tensor(0.1)).state_dict()
    checkpoint["param_groups"][0]["mine"] = [1]
    optimizer = FusedAdam(parameters(torch.float32, SHAPES))
    optimizer.load_state_dict(checkpoint)
    [group] = optimizer.param_groups
    group["lr"].fill_(5.0)
    group["mine"].append(2)
    assert checkpoint["param_groups"][0]["lr"] == torch.tensor(0.1) and checkpoint["param_groups"][
        0
    ]["mine"] == [1]


class Allocations(TorchDispatchMode):
    """Bytes of every storage that operations make while it is on."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue
            if tensor.untyped_storage()._cdata not in given:
                self.bytes += tensor.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("running", [False, True])
def test_loading_makes_no_second_copy_of_the_state(running):
    """A new optimizer allocates its segments and nothing else; a running one allocates nothing."""
    shapes = [(1000,), (200, 50), (128, 3)]
    a, b = (FusedAdam(parameters(torch.float32, shapes)) for _ in range(2))
    train(a, 1)
    if running:
        train(b, 1)
    checkpoint = a.state_dict()
    state_bytes = sum(
        e[key].nbytes for e in checkpoint["state"].values() for key in ("exp_avg", "exp_avg_sq")
    )
    with Allocations() as made:
        b.load_state_dict(checkpoint)
    assert made.bytes <= 1000 + (0 if running else state_bytes + 3 * 2 * 128 * 4)
    assert running or made.bytes >= state_bytes


def test_loading_into_a_running_optimizer_keeps_its_memory():
    a, b = (FusedAdam(parameters(torch.float32, SHAPES)) for _ in range(2))
    train(a, 5)
    train(b, 2)
    pointers = [b.state[p]["exp_avg"].data_ptr() for p in b.param_groups[0]["params"]]
    b.load_state_dict(a.state_dict())
    assert [b.state[p]["exp_avg"].data_ptr() for p in b.param_groups[0]["params"]] == pointers
    moments = [
        [{key: entry[key] for key in entry if key != "param"} for entry in results(x)]
        for x in (a, b)
    ]
    assert same_bits(*moments) and [entry["step"].item() for entry in moments[1]] == [5] * len(
        SHAPES
    )


def test_state_of_parameters_the_checkpoint_lacks_is_dropped():
    a, b = (FusedAdam(parameters(torch.float32, SHAPES)) for _ in range(2))
    train(a, 1)
    train(b, 3)
    checkpoint = a.state_dict()
    del checkpoint["state"][1]
    b.load_state_dict(checkpoint)
    train(b, 1)
    assert [r["step"].item() for r in results(b)] == [2, 1, 2, 2]


def test_plain_numbers_and_extra_entries_load():
    """Old checkpoints hold the step as a number; users and hooks add entries of their own."""
    a = FusedAdam(parameters(torch.float32, SHAPES))
    train(a, 3)
    checkpoint = a.state_dict()
    for entry in checkpoint["state"].values():
        entry["step"] = 3
        entry["mine"] = torch.arange(3)
        entry[7] = torch.ones(2)  # torch asks for no strings
    checkpoint["state"]["note"] = {"kept": [1, 2]}
    b = FusedAdam(copies(a))
    b.load_state_dict(checkpoint)
    train(a, 1, first=3)
    train(b, 1, first=3)
    assert b.state["note"] == {"kept": [1, 2]}
    for got, want in zip(results(b), results(a), strict=True):
        assert torch.equal(got.pop("mine"), torch.arange(3)) and torch.equal(
            got.pop(7), torch.ones(2)
        )
        assert same_bits([got], [want])


def test_older_checkpoints_without_newer_options_load():
    a = FusedAdamW(parameters(torch.float32, SHAPES))
    train(a, 1)
    checkpoint = a.state_dict()
    for key in (
        "amsgrad",
        "maximize",
        "foreach",
        "capturable",
        "differentiable",
        "fused",
        "decoupled_weight_decay",
    ):
        del checkpoint["param_groups"][0][key]
    b = FusedAdamW(copies(a))
    b.load_state_dict(checkpoint)
    assert (
        b.param_groups[0]["decoupled_weight_decay"] is True
        and b.param_groups[0]["amsgrad"] is False
    )
    train(b, 1)


def test_names_come_from_the_checkpoint_or_stay():
    named = [("a", torch.zeros(2)), ("b", torch.zeros(3))]
    ours, other = FusedAdam(named), FusedAdam([("x", torch.zeros(2)), ("y", torch.zeros(3))])
    ours.load_state_dict(other.state_dict())
    assert ours.param_groups[0]["param_names"] == ["x", "y"]
    ours.load_state_dict(FusedAdam([torch.zeros(2), torch.zeros(3)]).state_dict())
    assert ours.param_groups[0]["param_names"] == ["x", "y"]


def test_hooks_run_around_state_dict_and_load():
    optimizer = FusedAdam(parameters(torch.float32, SHAPES))
    train(optimizer, 1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda opt, d: seen.append("after saving"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, d: seen.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("after loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before saving", "after saving", "before loading", "after loading"]
    optimizer.register_load_state_dict_pre_hook(lambda opt, d: {**d, "param_groups": []})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(optimizer.state_dict())


def test_moments_are_kept_in_the_parameters_dtype():
    """torch's rule without a recipe: an fp32 checkpoint of a bf16 parameter loads as bf16, and so
    does ours.
    """
    a = FusedAdam(parameters(torch.float32, SHAPES))
    train(a, 2)
    b = FusedAdam(parameters(torch.bfloat16, SHAPES))
    b.load_state_dict(a.state_dict())
    for got, want in zip(results(b), results(a), strict=True):
        assert (
            torch.equal(got["exp_avg"], want["exp_avg"].bfloat16())
            and got["step"].dtype == torch.float32
        )
    train(b, 1)


def test_channels_last_moments_load_by_value():
    def make():
        values = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        return values.requires_grad_()

    a = FusedAdam([make()])
    train(a, 2)
    checkpoint = a.state_dict()
    b = FusedAdam([make()])
    entry = checkpoint["state"][0]
    checkpoint["state"][0] = {key: value.contiguous() for key, value in entry.items()}
    b.load_state_dict(checkpoint)
    [got], [want] = results(b), results(a)
    assert torch.equal(got["exp_avg"], want["exp_avg"])
    assert b.state[b.param_groups[0]["params"][0]]["exp_avg"].is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("flatten", [False, True])
def test_a_state_dict_that_is_sent_to_another_process_leaves_ours_alone(flatten):
    """A queue sends it from a thread, later: its storages move to shared memory, whatever was done
    meanwhile.
    """
    optimizers = [
        FusedAdam(parameters(torch.float32, [(5,), (3, 4)]), flatten=flatten) for _ in range(2)
    ]
    train(optimizers[0], 1)
    state_dict = optimizers[0].state_dict()
    train(optimizers[0], 1, first=1)
    ForkingPickler.dumps(state_dict)  # what a queue does
    assert state_dict["state"][0]["exp_avg"].is_shared()
    train(optimizers[0], 2, first=2)
    train(optimizers[1], 4)
    assert same_bits(*map(results, optimizers))


def test_a_state_dict_holds_what_a_differentiable_step_made():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param.clone()], differentiable=True)
    clone = optimizer.param_groups[0]["params"][0]
    clone.grad = torch.ones(3, requires_grad=True) * 2
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["exp_avg"].requires_grad


@pytest.mark.gpu
def test_a_state_dict_can_be_sent_from_a_gpu_to_another_process():
    """CUDA sends whole allocations: so not the moments of `optimizer.state`, nor parameters in flat
    buffers.
    """
    from torch.multiprocessing.reductions import reduce_tensor

    params = [torch.nn.Parameter(torch.ones(100, device="cuda")) for _ in range(3)]
    optimizer = FusedAdamW(params, flatten=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    entries = optimizer.state_dict()["state"].values()
    for entry, p in zip(entries, params, strict=True):
        for key, value in entry.items():
            assert torch.equal(value, optimizer.state[p][key].to(value.device))
            reduce_tensor(value)
    with pytest.raises(RuntimeError, match="invalid device pointer"):
        reduce_tensor(optimizer.state[params[1]]["exp_avg"])
    with pytest.raises(RuntimeError, match="invalid device pointer"):
        reduce_tensor(params[1].detach())
    reduce_tensor(copy.deepcopy(params[1]).detach())
