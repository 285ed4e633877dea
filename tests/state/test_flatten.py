"""flatten=True: what moves, what stays, and that everything around it keeps working."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from training import gradient, parameters, results, same_bits, train, values

from fused_adam import FusedAdam, FusedAdamW
from fused_adam.state.memory import segments


def attached(optimizer):
    """The optimizer, its parameters' gradients in the buffers: they go there when there has been
    one.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                param.grad = torch.ones_like(param)
    optimizer.zero_grad()
    return optimizer


def in_place(optimizer, param):
    """Whether the parameter still lies in the flat buffer, and its gradient too."""
    place = optimizer._engine.flat.flat_params.get(param)
    return (
        place is not None
        and param.grad is not None
        and optimizer._engine.flat.find(param, param.grad) is not None
    )


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def fit(module, optimizer, steps, zero_grad=None):
    losses = []
    for step in range(steps):
        x = values((16, 4), step, torch.float32)
        (zero_grad or optimizer.zero_grad)()
        loss = (module(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_moves_parameters_and_gradients_into_two_buffers():
    module = model()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = FusedAdam(module.parameters(), flatten=True)
    params = list(module.parameters())
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(
        p.grad is None for p in params
    )  # whoever asks for gradients before training finds none
    attached(optimizer)
    assert all(in_place(optimizer, p) and (p.grad == 0).all() for p in params)
    distances = {p.data_ptr() - params[0].data_ptr() for p in params}
    assert distances == {0, 128, 256, 384}  # slots of 32 float32 elements


@pytest.mark.gpu
def test_moves_every_parameter_on_a_gpu():
    """There a storage says of itself that other processes share it, always."""
    module = model().to("cuda")
    optimizer = FusedAdamW(module.parameters(), flatten=True)
    assert len(optimizer._engine.flat.flat_params) == len(list(module.parameters())) == 4
    attached(optimizer)
    assert all(in_place(optimizer, p) for p in module.parameters())


@pytest.mark.parametrize("set_to_none", [False, True])
def test_training_gives_the_same_bits_as_without(set_to_none):
    plain, flat = model(), model()
    a, b = FusedAdamW(plain.parameters()), FusedAdamW(flat.parameters(), flatten=True)
    assert fit(plain, a, 10) == fit(flat, b, 10, lambda: b.zero_grad(set_to_none))
    assert same_bits(results(a), results(b))
    assert all(in_place(b, p) for p in flat.parameters())


def test_gradients_accumulate_in_the_buffer():
    module = model()
    optimizer = attached(FusedAdam(module.parameters(), flatten=True))
    x = values((16, 4), 0, torch.float32)
    for times in (1, 2):
        module(x).sum().backward()
        assert all(in_place(optimizer, p) for p in module.parameters())
        if times == 1:
            once = [p.grad.clone() for p in module.parameters()]
    for p, grad in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * grad)
    optimizer.zero_grad(set_to_none=True)
    assert all((p.grad == 0).all() for p in module.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_unused_parameter_is_skipped_as_in_torch(set_to_none):
    """A view that nothing has written is no gradient: neither its moments nor its weights decay,
    nor is a step counted.

    With set_to_none=False a gradient that was there once is one of zeros, in torch and here.
    """
    runs = []
    for cls, extra in ((torch.optim.AdamW, {}), (FusedAdamW, {"flatten": True})):
        params = [nn.Parameter(torch.ones(3)) for _ in range(4)]
        used, unused, sometimes, frozen = params
        optimizer = cls(params, lr=0.1, weight_decay=0.5, **extra)
        optimizer.step()  # before the first backward: nothing
        assert not optimizer.state
        for step in range(3):
            optimizer.zero_grad(set_to_none)
            if step == 2:
                frozen.requires_grad_(False)
            optimizer.step()  # before this backward
            loss = (
                used.sum()
                + (sometimes.sum() if step == 1 else 0)
                + (frozen.sum() if step < 2 else 0)
            )
            loss.backward()
            optimizer.step()
        assert unused not in optimizer.state and torch.equal(unused.detach(), torch.ones(3))
        runs.append(
            [optimizer.state[p]["step"].item() for p in (used, sometimes, frozen)]
            + [p.detach() for p in params]
        )
    expected, ours = runs
    assert ours[:3] == expected[:3] == ([3, 1, 2] if set_to_none else [5, 3, 5])
    torch.testing.assert_close(ours[3:], expected[3:], rtol=1e-6, atol=1e-7)


def test_what_others_can_see_stays_where_it_is():
    base = torch.zeros(40)
    half = base[:20].requires_grad_()  # a view: moving it would part it from its base
    tied = nn.Parameter(torch.zeros(8))
    alias = tied.detach()  # somebody else's window on the same storage
    strided = torch.zeros(4, 6)[:, ::2].requires_grad_()
    transposed = nn.Parameter(torch.zeros(3, 5).t())
    shared = nn.Parameter(torch.zeros(4).share_memory_())
    empty = nn.Parameter(torch.zeros(0))
    complex_ = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    eligible = nn.Parameter(torch.zeros(5))
    params = [half, tied, strided, transposed, shared, empty, complex_, eligible]
    pointers = [p.data_ptr() for p in params]
    optimizer = FusedAdam(params, lr=0.1, flatten=True)
    assert list(optimizer._engine.flat.flat_params) == [eligible]
    assert [p.data_ptr() for p in params[:-1]] == pointers[:-1]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert (base[:20] == half).all() and (base[20:] == 0).all() and (base[:20] < 0).all()
    assert torch.equal(alias, tied)


def test_frozen_parameters_cost_no_memory():
    """They stay where they are and have no gradient; a parameter frozen later keeps its place."""
    adapter, later, base = (
        nn.Linear(3, 3),
        nn.Linear(2, 2),
        nn.Linear(100, 100).requires_grad_(False),
    )
    pointers = [param.data_ptr() for param in base.parameters()]
    optimizer = FusedAdam(
        [*base.parameters(), *adapter.parameters(), *later.parameters()], flatten=True
    )
    assert [param.data_ptr() for param in base.parameters()] == pointers
    assert (
        sum(segment.numel() for segment in optimizer._engine.flat.grad_segments)
        < base.weight.numel()
    )
    attached(optimizer)
    later.requires_grad_(False)
    optimizer.zero_grad()
    assert all(in_place(optimizer, param) for param in adapter.parameters())
    assert all(param.grad is None for param in [*base.parameters(), *later.parameters()])
    assert all(
        optimizer._engine.flat.flat_params[param].holds(param) for param in later.parameters()
    )


def test_dtypes_have_buffers_of_their_own_and_tied_weights_move_once():
    shared = nn.Linear(3, 3)
    module = nn.ModuleList([shared, nn.Linear(3, 3).to(torch.bfloat16)])
    optimizer = FusedAdam([*module.parameters()], flatten=True)
    assert len(optimizer._engine.flat.grad_segments) == 2
    assert len(optimizer._engine.flat.flat_params) == 4


@pytest.mark.parametrize("beside", [False, True], ids=["all in buffers", "one beside"])
@pytest.mark.parametrize(
    "leave", ["none", "another", "later", "turned", "data", "frozen", "unfrozen"]
)
def test_leaving_the_buffer_is_served(leave, beside):
    """Whatever the user does to one parameter, the results are those without buffers."""
    runs = []
    for flatten in (False, True):
        params = parameters(torch.float32, [(5,), (6, 6), (7,)])
        if beside:
            params.append(values((4, 2), 9, torch.float32)[:, 0].requires_grad_())
        if leave == "unfrozen":
            params[1].requires_grad_(False)
        optimizer = FusedAdamW(params, flatten=flatten)
        for step in range(6):
            if step == 3 and leave in ("frozen", "unfrozen"):
                params[1].requires_grad_(leave == "unfrozen")
            optimizer.zero_grad()
            for index, p in enumerate(params):
                if p.requires_grad:
                    (p * values(p.shape, 10 * step + index, torch.float32)).sum().backward()
            if leave == "none" and step >= 3:
                params[1].grad = None
            if leave == "another" or (leave == "later" and step >= 3):
                params[1].grad = params[1].grad * 2  # which the buffer does not hold
            if leave == "turned" and step >= 3:
                params[1].grad = params[1].grad.t()  # at the same address
            if leave == "data" and step == 2:
                params[1].data = params[1].data.clone()
            optimizer.step()
        runs.append(results(optimizer))
    assert same_bits(*runs)


def test_a_group_added_later_is_served():
    runs = []
    for flatten in (False, True):
        params = parameters(torch.float32, [(5,), (6,)])
        optimizer = FusedAdamW(params[:1], flatten=flatten)
        train(optimizer, 2)
        optimizer.add_param_group({"params": params[1:], "lr": 0.1})
        train(optimizer, 2)
        runs.append(results(optimizer))
        assert [r["step"].item() for r in runs[-1]] == [4, 2]
    assert same_bits(*runs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_have_buffers_of_their_own(copied):
    module = model()
    optimizer = FusedAdam(module.parameters(), flatten=True)
    fit(module, optimizer, 3)
    twin, twin_optimizer = copied((module, optimizer))
    before = [p.detach().clone() for p in module.parameters()]
    a = fit(twin, twin_optimizer, 3)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    assert fit(module, optimizer, 3) == a
    assert same_bits(results(optimizer), results(twin_optimizer))
    assert all(in_place(twin_optimizer, p) for p in twin.parameters())


def test_saving_one_parameter_or_moment_does_not_save_the_buffer():
    params = parameters(torch.float32, [(4,)] * 300)
    optimizer = FusedAdam(params, flatten=True)
    train(optimizer, 1)
    for tensor in (params[7].detach(), optimizer.state[params[7]]["exp_avg"]):
        file = io.BytesIO()
        torch.save(tensor, file)
        assert file.tell() < 4000  # the buffers are 150 kB each


def test_model_state_dict_loads_into_the_buffer():
    module, source = model(), model()
    optimizer = FusedAdam(module.parameters(), flatten=True)
    fit(source, FusedAdam(source.parameters()), 2)
    module.load_state_dict(source.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), source.parameters(), strict=True)
    )
    attached(optimizer)
    assert all(in_place(optimizer, p) for p in module.parameters())


def test_the_storages_outlive_the_optimizer():
    module = model()
    optimizer = FusedAdam(module.parameters(), flatten=True)
    fit(module, optimizer, 2)
    before = [p.detach().clone() for p in module.parameters()]
    del optimizer
    junk = [torch.full((1000,), 5.0) for _ in range(50)]
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)) and junk


def test_segments_are_split_at_their_limit(monkeypatch):
    monkeypatch.setattr("fused_adam.state.memory.SEGMENT_BYTES", 4 * 900)
    parts = list(segments([300, 300, 300, 2000, 1], torch.float32, torch.device("cpu")))
    assert [[slot.numel for slot in part] for part in parts] == [[300, 300], [300], [2000], [1]]
    assert [slot.start for part in parts for slot in part] == [0, 320, 0, 0, 0]
    assert [part[0].segment.numel() for part in parts] == [640, 320, 2016, 32]


def test_flattened_training_across_segments(monkeypatch):
    monkeypatch.setattr("fused_adam.state.memory.SEGMENT_BYTES", 4 * 400)
    runs = []
    for flatten in (False, True):
        optimizer = FusedAdamW(
            parameters(torch.float32, [(300,), (50,), (600,), (7,), (0,)]), flatten=flatten
        )
        train(optimizer, 3)
        runs.append(results(optimizer))
    assert same_bits(*runs)


def test_bad_value_is_named():
    with pytest.raises(TypeError, match="flatten=1 must be True or False"):
        FusedAdam([nn.Parameter(torch.zeros(1))], flatten=1)
    with pytest.raises(ValueError, match="differentiable"):
        FusedAdam([nn.Parameter(torch.zeros(1))], flatten=True, differentiable=True)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_parameter_listed_twice_does_not_count_for_its_neighbours(flatten):
    """It counts two steps where they count one: updated as one row, they would take its bias
    correction.
    """
    ours, theirs = (parameters(torch.float32, [(5,), (5,), (5,)]) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = FusedAdam([ours[0], *ours], flatten=flatten)
        expected = torch.optim.Adam([theirs[0], *theirs], foreach=False)
    for number in range(3):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            q.grad = gradient(q, i, number)
            p.grad = q.grad.clone()
        optimizer.step()
        expected.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_parameters_whose_gradients_have_another_dtype_keep_them():
    """Master gradients: no buffer of the parameter's dtype takes their place, neither at first nor
    at zero_grad.
    """
    params = [parameters(torch.bfloat16, [(5,), (4,)]) for _ in range(2)]
    for _, early in params:
        early.grad_dtype = torch.float32
    plain, flat = FusedAdam(params[0]), FusedAdam(params[1], flatten=True)
    assert params[1][1].grad is None
    for step in range(3):
        for late, early in params:
            late.grad = None
            late.grad_dtype = torch.float32 if step else torch.bfloat16
            late.grad = gradient(late, 0, step, late.grad_dtype)
            early.grad = gradient(early, 1, step, torch.float32)
        for optimizer in (plain, flat):
            optimizer.step()
            optimizer.zero_grad()
        assert (params[1][0].grad is None) == (step > 0) and params[1][1].grad is None
    assert same_bits(results(plain), results(flat))
