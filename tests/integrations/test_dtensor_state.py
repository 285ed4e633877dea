"""State of DTensor parameters: its form, copies, the host and back, moves by a loop."""

import copy
import pickle
import weakref

import pytest
import torch
from ranks import run_ranks
from sharded_runs import FEW_SHAPES, SHAPES, STEPS, in_rows, parameters, train
from shards import whole, whole_results
from streams import simulate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from training import same_bits

from fused_adam import FusedAdamW
from fused_adam.state import offload


def layout(rank):
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.bfloat16, [(5, 8), (3,)], mesh, (Shard(0),))
    optimizer = FusedAdamW(params, lr=0.1, precision="split24-int8", amsgrad=True)
    train(optimizer, 1)
    for param in params:
        entry = optimizer.state[param]
        assert type(entry["step"]) is torch.Tensor
        for key in ("exp_avg_ratio", "exp_avg_sq_lattice", "remainder", "max_exp_avg_sq"):
            assert isinstance(entry[key], DTensor) and entry[key].shape == param.shape
            assert (
                entry[key].placements == param.placements
                and entry[key].device_mesh == param.device_mesh
            )
            assert entry[key].stride() == param.stride()
        assert isinstance(entry["exp_avg_ratio_scale"], DTensor)
    before = params[0].to_local().detach().clone()
    codes = optimizer.state[params[0]]["exp_avg_ratio"]
    codes.to_local().fill_(100)  # what users see is what the step reads
    optimizer.state[params[0]]["exp_avg_ratio_scale"].to_local().fill_(1.0)
    train(optimizer, 1)
    moved = (params[0].to_local().detach() - before).abs().max()
    return moved.item(), int(codes.to_local().flatten()[0])


def test_state_is_dtensors_over_the_memory_that_steps_use():
    for moved, code in run_ranks(2, layout):
        assert moved > 0.01 and code not in (0, 100)


def copied(rank, how):
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.bfloat16, SHAPES, mesh, (Shard(0),))
    optimizer = FusedAdamW(params, lr=1e-2, precision="split32-bf16")
    train(optimizer, 2)
    model = torch.nn.ParameterList(params)
    if how == "deepcopy":
        _, other = copy.deepcopy((model, optimizer))
    else:
        _, other = pickle.loads(pickle.dumps((model, optimizer)))
    train(other, 2, first=2)
    train(optimizer, 2, first=2)
    return whole_results(optimizer), whole_results(other)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(how):
    for mine, its in run_ranks(2, copied, how):
        assert same_bits(mine, its)


def offloaded(rank, options):
    """As on a GPU: here there is no other memory, so one place of it stands for the host's."""
    offload.host_memory = lambda tensor: torch.empty_like(tensor)
    mesh = init_device_mesh("cpu", (2,))
    optimizer = FusedAdamW(
        parameters(torch.bfloat16, SHAPES, mesh, (Shard(0),)), lr=1e-2, **options
    )
    train(optimizer, 2)
    before = whole_results(optimizer)
    optimizer.offload()
    meanwhile = whole_results(optimizer)
    optimizer.reload()
    train(optimizer, 2, first=2)
    return before, meanwhile, whole_results(optimizer)


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8"])
def test_state_goes_to_the_host_and_back(precision):
    everyone = run_ranks(2, offloaded, {"precision": precision})
    [trained, _] = run_ranks(2, in_rows, 2, torch.bfloat16, {"precision": precision}, SHAPES)
    for before, meanwhile, after in everyone:
        assert same_bits(before, meanwhile) and same_bits(after, trained[0])


def streamed(rank, precision):
    """As on a GPU: streams are simulated. Rows of 7 and 6, so shards end within a group."""
    simulate(pytest.MonkeyPatch())
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for more in ({}, {"state_device": "cpu", "stream_bytes": 12_000}):
        params = parameters(torch.bfloat16, [(13, 150), (3,), (5, 8)], mesh, (Shard(0),))
        optimizer = FusedAdamW(
            params, lr=1e-2, precision=precision, backend="triton", max_grad_norm=1.0, **more
        )
        train(optimizer, 3)
        found.append((whole_results(optimizer), optimizer.state_dict()["state"][0]))
    (resident, _), (on_host, entry) = found
    assert all(isinstance(entry[key], DTensor) for key in entry if key != "step")
    return resident, on_host


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8"])
def test_state_on_the_host_has_the_bits_of_state_on_the_device(precision):
    for resident, on_host in run_ranks(2, streamed, precision):
        assert same_bits(resident, on_host)


def copied_entry_by_entry(entry):
    """As verl, NeMo-RL and prime-rl move state: `.to("cpu")` makes another tensor on a GPU."""
    for key, value in entry.items():
        if isinstance(value, torch.Tensor):
            entry[key] = value.to("cpu", copy=True)


def copied_in_a_new_entry(entry):
    """Moments alone, all at once: the step counter stays."""
    entry.update({key: value.clone() for key, value in entry.items() if key != "step"})


def copied_within(entry):
    """The DTensor stays, over other memory."""
    for value in entry.values():
        if isinstance(value, DTensor):
            value._local_tensor = value._local_tensor.clone()


def moved_by_loops(rank, options, move):
    """State goes away and comes back after every step, and at first is made by `init_state()`."""
    mesh = init_device_mesh("cpu", (2,))
    optimizer = FusedAdamW(
        parameters(torch.bfloat16, FEW_SHAPES, mesh, (Shard(0),)), lr=1e-2, **options
    )
    optimizer.init_state()
    freed = []
    for step in range(STEPS):
        for _ in ("there", "back"):
            param_states = optimizer._engine.arena.param_states.values()
            memory = [
                weakref.ref(slot.segment) for home in param_states for slot in home.slots.values()
            ]
            for entry in optimizer.state.values():
                move(entry)
            freed.append(all(ref() is None for ref in memory))
        train(optimizer, 1, first=step)
    return (
        whole_results(optimizer),
        freed,
        [type(value) for value in optimizer.state[optimizer._params()[0]].values()],
    )


@pytest.mark.parametrize(
    ("precision", "backend"), [("split32-bf16", "reference"), ("split24-int8", "triton")]
)
@pytest.mark.parametrize("move", [copied_entry_by_entry, copied_in_a_new_entry, copied_within])
def test_state_that_a_loop_moves(move, precision, backend):
    """What kernels step is free at once, and the bits are those of a training without the loop."""
    everyone = run_ranks(2, moved_by_loops, {"precision": precision, "backend": backend}, move)
    [trained, _] = run_ranks(2, in_rows, 2, torch.bfloat16, {"precision": precision}, FEW_SHAPES)
    for found, freed, types_of_entries in everyone:
        assert same_bits(found, trained[0])
        assert all(freed) or move is copied_within or backend == "reference"
        assert types_of_entries[0] is torch.Tensor and {*types_of_entries[1:]} == {DTensor}


def gathered(rank, placement, form):
    """A checkpoint of split32, loaded by shards: its form, and whether its bits came through."""
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.bfloat16, [(33, 6), (3, 34), (6, 4)], mesh, (placement,))
    optimizer = FusedAdamW(params, lr=1e-2, precision="split32")
    train(optimizer, 2)
    checkpoint = optimizer.state_dict()
    for param, entry in zip(params, checkpoint["state"].values(), strict=True):
        pairs, remainder = entry["remainder"], optimizer.state[param]["remainder"]
        assert pairs.dtype == torch.int8 and pairs.shape == (*param.shape, 2)
        assert pairs.placements == param.placements
        assert pairs.to_local().data_ptr() == remainder.to_local().data_ptr()
        assert torch.equal(pairs.full_tensor().view(torch.int16).squeeze(-1), whole(remainder))
        if form == "int16":  # as optimizer.state has it
            entry["remainder"] = remainder
        elif form == "whole":
            entry["remainder"] = pairs.full_tensor()
        elif form == "replicated":
            entry["remainder"] = pairs.redistribute(mesh, (Replicate(),))
    other = FusedAdamW(copy.deepcopy(params), lr=1e-2, precision="split32")
    other.load_state_dict(copy.deepcopy(checkpoint))
    loaded = same_bits(whole_results(other), whole_results(optimizer))
    for trained in (optimizer, other):
        train(trained, 2, first=2)
    return loaded, same_bits(whole_results(other), whole_results(optimizer))


@pytest.mark.parametrize("form", ["pairs", "int16", "whole", "replicated"])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1)], ids=str)
def test_split32_state_can_be_gathered(placement, form):
    """In a state_dict remainders are pairs of bytes: collectives carry no int16."""
    assert run_ranks(2, gathered, placement, form) == [(True, True)] * 2


def gathered_by_plain_parameters(rank):
    mesh = init_device_mesh("cpu", (2,))
    shapes = [(33, 6), (3, 34)]
    optimizer = FusedAdamW(
        parameters(torch.bfloat16, shapes, mesh, (Shard(0),)), lr=1e-2, precision="split32"
    )
    train(optimizer, 2)
    plain = FusedAdamW(parameters(torch.bfloat16, shapes), lr=1e-2, precision="split32")
    plain.load_state_dict(optimizer.state_dict())
    states = [[entry["remainder"] for entry in x.state.values()] for x in (plain, optimizer)]
    return all(map(torch.equal, states[0], map(whole, states[1])))


def test_plain_parameters_gather_split32_state_of_shards():
    assert run_ranks(2, gathered_by_plain_parameters) == [True, True]


def swapped(rank):
    """Averages of shards in the model, and the exact shards back."""
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.bfloat16, SHAPES, mesh, (Shard(0),))
    optimizer = FusedAdamW(params, lr=1e-2, precision="split32", ema_decay=0.5)
    train(optimizer, 2)
    before = whole_results(optimizer)
    with optimizer.swap_ema():
        for param, row in zip(params, whole_results(optimizer), strict=True):
            assert torch.equal(row["param"], row["ema"].bfloat16())
            assert isinstance(param, DTensor)
    assert same_bits(whole_results(optimizer), before)
    # What a user puts there may be whole.
    optimizer.state[params[0]]["ema"] = whole(optimizer.state[params[0]]["ema"])
    averages = optimizer.ema_state_dict()
    assert all(average.placements == (Shard(0),) for average in averages.values())
    model = torch.nn.ParameterList(params)
    model.load_state_dict({str(i): average for i, average in averages.items()})
    return [torch.equal(whole(p), whole(averages[i]).bfloat16()) for i, p in enumerate(params)]


def test_averages_of_shards_are_in_the_model_for_a_while():
    assert all(map(all, run_ranks(2, swapped)))
