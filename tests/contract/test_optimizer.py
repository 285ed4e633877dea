"""The ordinary training loop: groups, closures, schedulers, missing gradients, and clear errors."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from training import gradient, parameters, results, same_bits, train, values

from fused_adam import FusedAdam, FusedAdamW

BACKENDS = ["reference", "triton"]
FLATTEN = [False, True]


def close(optimizer, reference, atol=1e-6):
    for ours, theirs in zip(results(optimizer), results(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=atol)


def pair(shapes=((5,), (3, 4)), ours=FusedAdam, theirs=torch.optim.Adam, **options):
    """Our optimizer and torch's on equal parameters."""
    extra = {key: options.pop(key) for key in ("flatten", "backend") if key in options}
    a = ours(parameters(torch.float32, shapes), **options, **extra)
    return a, theirs(parameters(torch.float32, shapes), **options)


def test_is_a_torch_adam():
    adam, adamw = FusedAdam([torch.zeros(1)]), FusedAdamW([torch.zeros(1)])
    assert isinstance(adam, torch.optim.Adam) and not isinstance(adam, torch.optim.AdamW)
    assert isinstance(adamw, torch.optim.AdamW) and isinstance(adamw, FusedAdam)
    for ours, theirs in (
        (adam, torch.optim.Adam([torch.zeros(1)])),
        (adamw, torch.optim.AdamW([torch.zeros(1)])),
    ):
        assert ours.defaults == theirs.defaults and list(ours.defaults) == list(theirs.defaults)
        assert list(ours.param_groups[0]) == list(theirs.param_groups[0])


@pytest.mark.parametrize("flatten", FLATTEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_param_groups_have_their_own_options(backend, flatten):
    runs = []
    for cls, extra in (
        (FusedAdam, {"backend": backend, "flatten": flatten}),
        (torch.optim.Adam, {}),
    ):
        params = parameters(torch.float32, [(5,), (6,), (7,), (8,)])
        groups = [
            {"params": params[0], "lr": 1e-2},
            {"params": params[1:2], "betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": True},
            {"params": params[2:3], "weight_decay": 0.1, "maximize": True},
            {"params": params[3:], "weight_decay": 0.1, "decoupled_weight_decay": True},
        ]
        runs.append(cls(groups, lr=1e-3, **extra))
        train(runs[-1], 5)
    close(*runs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_add_param_group_after_steps(backend):
    a, b = pair(backend=backend)
    for optimizer in (a, b):
        train(optimizer, 3)
        optimizer.add_param_group({"params": parameters(torch.float32, [(9,)]), "lr": 0.1})
        train(optimizer, 2)
    assert [r["step"].item() for r in results(a)] == [5, 5, 2]
    close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_gradients_are_skipped(backend):
    """Nothing of them changes, and they have no state; state appears with the first gradient."""
    a, b = pair(((5,), (6,), (7,)), backend=backend)
    for optimizer in (a, b):
        params = optimizer.param_groups[0]["params"]
        for step in range(6):
            for index, p in enumerate(params):
                p.grad = gradient(p, index, step)
            if step in (0, 3):
                params[1].grad = None
            if step >= 2:
                params[2].grad = None
            optimizer.step()
            if step == 0:
                assert params[1] not in optimizer.state and len(optimizer.state) == 2
    assert [r["step"].item() for r in results(a)] == [6, 4, 2]
    close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_steps_large_parameters_that_end_within_a_slot(dtype):
    """They are not copied. Compiled code takes whole slots only: the rest goes through a copy."""
    arena = torch.full((20037,), 7.0, dtype=dtype)
    runs = []
    for backend in ("compiled", "reference"):
        memory = arena.clone()
        param = memory[16:-16].copy_(values((20005,), 0, dtype)).requires_grad_()
        optimizer = FusedAdamW([param], lr=0.1, amsgrad=True, backend=backend)
        train(optimizer, 3)
        assert (memory[:16] == 7).all() and (memory[-16:] == 7).all()
        runs.append(results(optimizer))
    assert same_bits(*runs)


def test_step_without_any_gradient_does_nothing():
    a, _ = pair()
    before = results(a)
    assert a.step() is None
    assert same_bits(results(a), before) and not a.state


@pytest.mark.parametrize("flatten", FLATTEN)
def test_frozen_and_unfrozen_layers_keep_their_counters(flatten):
    a, b = pair(((5,), (6,)), flatten=flatten, weight_decay=0.1)
    for optimizer in (a, b):
        frozen = optimizer.param_groups[0]["params"][1]
        for step in range(7):
            frozen.requires_grad_(not 3 <= step < 5)
            optimizer.zero_grad()
            for index, p in enumerate(optimizer.param_groups[0]["params"]):
                if p.requires_grad:
                    (p * gradient(p, index, step)).sum().backward()
            optimizer.step()
    assert [r["step"].item() for r in results(a)] == [7, 5]
    close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_may_be_mixed_in_one_group(backend):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    mixed = [parameters(dtype, [(20,)])[0] for dtype in dtypes]
    optimizer = FusedAdam(mixed, lr=0.1, backend=backend)
    alone = [FusedAdam(parameters(dtype, [(20,)]), lr=0.1) for dtype in dtypes]
    for step in range(3):
        for p, single in zip(mixed, alone, strict=True):
            p.grad = gradient(p, 0, step)
            single.param_groups[0]["params"][0].grad = gradient(p, 0, step)
            single.step()
        optimizer.step()
    got = results(optimizer)
    assert same_bits(got[:3], [results(single)[0] for single in alone[:3]])
    torch.testing.assert_close(
        got[3]["param"], results(alone[3])[0]["param"], rtol=1e-15, atol=1e-15
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_parameters_are_pairs_of_real_ones(backend):
    real = values((6, 4, 2), 0, torch.float32)
    a = torch.view_as_complex(real.clone()).requires_grad_()
    b = real.clone().requires_grad_()
    ours, expected = FusedAdam([a], backend=backend), FusedAdam([b])
    for step in range(3):
        grad = gradient(b, 0, step)
        a.grad, b.grad = torch.view_as_complex(grad.clone()), grad
        if step == 1:  # a lazily conjugated gradient
            a.grad = a.grad.conj().resolve_conj().conj()
        ours.step()
        expected.step()
    assert a.dtype == ours.state[a]["exp_avg"].dtype == torch.complex64
    assert torch.equal(torch.view_as_real(a.detach()), b.detach())
    assert torch.equal(
        torch.view_as_real(ours.state[a]["exp_avg_sq"]), expected.state[b]["exp_avg_sq"]
    )


def test_closure_is_run_with_gradients_and_its_loss_returned():
    param = nn.Parameter(torch.ones(3))
    optimizer = FusedAdam([param], lr=0.1)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1 and (param < 1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),  # changes betas too
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: (t + 1) / 10),
    ],
)
@pytest.mark.parametrize("flatten", FLATTEN)
def test_schedulers(make, flatten):
    a, b = pair(flatten=flatten, lr=1e-2)
    for optimizer in (a, b):
        scheduler = make(optimizer)
        train(optimizer, 10, after=lambda _, s=scheduler: s.step())
    close(a, b, atol=3e-6)


def test_lr_and_betas_as_tensors():
    lr, betas = torch.tensor(1e-2), (torch.tensor(0.8), torch.tensor(0.99))
    for backend in BACKENDS:
        a = FusedAdam(parameters(torch.float32), lr=lr.clone(), betas=betas, backend=backend)
        b = FusedAdam(
            parameters(torch.float32), lr=lr.item(), betas=(betas[0].item(), betas[1].item())
        )
        for step in range(4):
            a.param_groups[0]["lr"].fill_(0.01 * (step + 1))
            b.param_groups[0]["lr"] = torch.tensor(0.01 * (step + 1)).item()
            train(a, 1, first=step)
            train(b, 1, first=step)
        assert same_bits(results(a), results(b))


def test_differentiable_goes_through_torch():
    gradients = []
    for cls in (FusedAdam, torch.optim.Adam):
        lr = torch.tensor(0.1, requires_grad=True)
        param = torch.ones(3, requires_grad=True).clone()
        optimizer = cls([param], lr=lr, differentiable=True)
        param.grad = torch.ones(3, requires_grad=True)
        optimizer.step()
        gradients += torch.autograd.grad(param.sum(), lr)
    assert gradients[0] == gradients[1] and gradients[0].round() == -3


def test_autograd_notices_that_a_step_changed_a_saved_tensor():
    for backend in BACKENDS:
        param = nn.Parameter(torch.ones(3))
        optimizer = FusedAdam([param], backend=backend)
        loss = (param * param).sum()
        param.grad = torch.ones(3)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("expanded", [False, True])  # such a gradient is stepped through copies
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_listed_twice_is_stepped_twice(backend, expanded):
    a = parameters(torch.float32, [(5,)])[0]
    with pytest.warns(UserWarning, match="duplicate"):
        twice = FusedAdam([a, a], backend=backend)
    b = parameters(torch.float32, [(5,)])[0]
    with pytest.warns(UserWarning, match="duplicate"):
        theirs = torch.optim.Adam([b, b])
    for step in range(3):
        grad = gradient(a, 0, step)
        a.grad = b.grad = grad[:1].expand(5) if expanded else grad
        twice.step()
        theirs.step()
    assert twice.state[a]["step"] == 6
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_parameter_listed_twice_counts_two_steps(backend, shape):
    """As in torch; two empty parameters that are not the same one count a step each."""
    counts = []
    for optimizer_class, options in ((FusedAdam, {"backend": backend}), (torch.optim.Adam, {})):
        p, other = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = optimizer_class([p, other, p], **options)
        train(optimizer, 3)
        counts.append([float(optimizer.state[q]["step"]) for q in (p, other)])
    assert counts == [[6, 3], [6, 3]]


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_overlap_are_stepped_in_order(backend, expanded):
    runs = []
    for cls, extra in ((FusedAdam, {"backend": backend}), (torch.optim.Adam, {})):
        base = values((12,), 0, torch.float32)
        params = [base[:8].requires_grad_(), base[4:].requires_grad_(), base[6:9].requires_grad_()]
        optimizer = cls(params, lr=0.1, weight_decay=0.1, **extra)
        for step in range(3):
            for index, p in enumerate(params):
                grad = gradient(p, index, step)
                p.grad = grad[:1].expand(p.shape) if expanded else grad
            optimizer.step()
        runs.append(base.detach().clone())
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_within_another_hides_no_overlap(backend):
    """The last lies within the first and ends before the second begins, which overlaps the first
    alone.

    What runs together on a GPU is never two that overlap: on a CPU one comes after the other
    anyway.
    """
    runs = []
    for cls, extra in ((FusedAdam, {"backend": backend}), (torch.optim.Adam, {})):
        base = values((60,), 0, torch.float32)
        params = [x.requires_grad_() for x in (base[:50], base[30:], base[10:20])]
        optimizer = cls(params, lr=0.1, weight_decay=0.1, **extra)
        for step in range(3):
            for index, p in enumerate(params):
                p.grad = gradient(p, index, step)
            optimizer.step()
        if cls is FusedAdam:
            assert len(optimizer._engine.usual.runners) == 3
        runs.append(base.detach().clone())
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-6)


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


def test_copies_continue_alike():
    for flatten in FLATTEN:
        a, _ = pair(flatten=flatten)
        train(a, 2)
        for twin in (copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
            assert twin._backend == a._backend and twin._flatten == flatten
            train(twin, 2, first=2)
            original = copy.deepcopy(a)
            train(original, 2, first=2)
            assert same_bits(results(twin), results(original))


def test_names_of_parameters_are_kept():
    module = nn.Linear(2, 3)
    optimizer = FusedAdam(module.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


class TestErrors:
    """Each names the argument, the value and what is allowed; nothing has changed before it."""

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
            ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
            ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
            ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
            (
                {"fused": True, "foreach": True},
                RuntimeError,
                "`fused` and `foreach` cannot be `True` together",
            ),
            (
                {"backend": "cuda"},
                ValueError,
                "backend='cuda' is not known; allowed: 'auto', 'triton', 'reference'",
            ),
            ({"backend": None}, ValueError, "backend=None is not known"),
            ({"flatten": "yes"}, TypeError, "flatten='yes' must be True or False"),
            ({"learning_rate": 1.0}, TypeError, "learning_rate"),
        ],
    )
    def test_arguments(self, arguments, error, message):
        param = nn.Parameter(torch.ones(3))
        pointer = param.data_ptr()
        with pytest.raises(error, match=message.replace("(", r"\(")):
            FusedAdam([param], **{"flatten": True, **arguments})
        assert param.data_ptr() == pointer and param.grad is None

    def test_no_parameters(self):
        with pytest.raises(ValueError, match="empty parameter list"):
            FusedAdam([])

    def check_nothing_changes(self, bad, grad, error, message):
        good = nn.Parameter(torch.ones(3))
        good.grad = torch.ones(3)
        bad.grad = grad
        optimizer = FusedAdam([good, bad])
        with pytest.raises(error, match=message):
            optimizer.step()
        assert (good == 1).all() and not optimizer.state

    def test_sparse_gradient(self):
        self.check_nothing_changes(
            nn.Parameter(torch.zeros(3)),
            torch.zeros(3).to_sparse(),
            RuntimeError,
            "does not support sparse gradients",
        )

    def test_integer_parameter(self):
        bad = torch.zeros(3, dtype=torch.int64)
        self.check_nothing_changes(
            bad,
            torch.zeros(3, dtype=torch.int64),
            TypeError,
            "parameter 1 .* torch.int64, but must be one of .*bfloat16",
        )

    def test_expanded_parameter(self):
        bad = torch.zeros(1).expand(3).requires_grad_()
        self.check_nothing_changes(bad, torch.zeros(3), RuntimeError, "parameter 1 .* is expanded")

    def test_state_of_the_wrong_shape(self):
        optimizer = FusedAdam([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))])
        train(optimizer, 1)
        before = results(optimizer)[0]
        last = optimizer.param_groups[0]["params"][1]
        optimizer.state[last]["exp_avg"] = torch.zeros(5)
        with pytest.raises(
            ValueError, match=r"state 'exp_avg' of parameter 1 .* shape \(5,\).* shape \(4,\)"
        ):
            train(optimizer, 1)
        assert same_bits([results(optimizer)[0]], [before])

    def test_tensor_subclasses(self):
        from torch.testing._internal.two_tensor import TwoTensor

        with pytest.raises(TypeError, match="TwoTensor, but must be a plain tensor"):
            FusedAdam([nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))])

    def test_meta_parameters_step_once_they_have_values(self):
        module = nn.Linear(2, 2, device="meta")
        optimizer = FusedAdam(module.parameters())
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        with pytest.raises(RuntimeError, match="cannot run on meta"):
            optimizer.step()
        optimizer.zero_grad()
        for p in module.parameters():
            torch.utils.swap_tensors(p, nn.Parameter(torch.ones(p.shape)))
        train(optimizer, 2)
        assert all(r["step"] == 2 for r in results(optimizer))


def test_state_is_made_on_a_gpu_that_is_not_the_current_one(monkeypatch):
    """torch's `__dlpack__` raises there; the second GPU is missing here, so it raises for all."""

    def refuse(self, **kwargs):
        raise BufferError("Can't export tensors on a different CUDA device index")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", refuse)
    for flatten in (False, True):
        optimizer = FusedAdam(parameters(torch.float32), flatten=flatten)
        train(optimizer, 1)
        assert all(entry["step"] == 1 for entry in optimizer.state.values())
