"""torch's contract: its own optimizer database and the logic of its optimizer tests, run against
both classes.

Configurations and error inputs come from `torch.testing._internal.common_optimizers`; the tests
follow, in own words, those of torch's test_optim.py that do not need a GPU. Every test runs with
`flatten` off and on.
"""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fused_adam import FusedAdam, FusedAdamW

# It imports expecttest, which only torch's own tests need: a machine with a GPU may lack it.
database = pytest.importorskip("torch.testing._internal.common_optimizers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:optimizer contains a parameter group with duplicate parameters"
)

PAIRS = [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)]
# "cuda" adds the capturable configurations, which our classes also step on a CPU.
INPUTS = {
    FusedAdam: [(i.desc, i.kwargs) for i in database.optim_inputs_func_adam("cuda")],
    FusedAdamW: [(i.desc, i.kwargs) for i in database.optim_inputs_func_adamw("cuda")],
}
ERRORS = [
    pytest.param(cls, error, id=f"{cls.__name__}-{error.optimizer_error_input.desc[:50]}")
    for cls, name in ((FusedAdam, "adam"), (FusedAdamW, "adamw"))
    for error in getattr(database, f"optim_error_inputs_func_{name}")("cpu", torch.float32)
]
CASES = [
    pytest.param(
        cls, theirs, kwargs, flatten, id=f"{cls.__name__}-{desc}{'-flatten' if flatten else ''}"
    )
    for cls, theirs in PAIRS
    for desc, kwargs in INPUTS[cls]
    for flatten in (False, True)
]
every_case = pytest.mark.parametrize(("ours", "theirs", "kwargs", "flatten"), CASES)
both_classes = pytest.mark.parametrize(("ours", "theirs"), PAIRS)
flat_or_not = pytest.mark.parametrize("flatten", [False, True])


def plain(kwargs):
    """The same options for torch on a CPU, where it steps neither capturable nor tensor options at
    their best.
    """
    options = {key: value for key, value in copy.deepcopy(kwargs).items() if key != "capturable"}
    if isinstance(options.get("lr"), torch.Tensor):
        options["lr"] = options["lr"].item()
    if "betas" in options:
        options["betas"] = tuple(beta.item() for beta in options["betas"])
    return options


def network(dtype=torch.float64, **factory):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(1, 3, dtype=dtype), nn.Sigmoid(), nn.Linear(3, 1, dtype=dtype), nn.Sigmoid()
    )  # fmt: skip


def assert_close(a, b, dtype):
    """torch's own tolerance between two of its implementations (common_utils.assertEqual; 5e-3 for
    half types).
    """
    half = dtype in (torch.float16, torch.bfloat16)
    options = {"rtol": 5e-3, "atol": 5e-3} if half else {}
    torch.testing.assert_close(a, b, **options)


class Assertions:
    """What database.TensorTracker asks of a test case."""

    def __init__(self, dtype):
        self.dtype = dtype

    def assertEqual(self, a, b, **_):
        assert_close(a, b, self.dtype)

    def assertGreater(self, a, b, message):
        assert a > b, message

    def assertTrue(self, value, message):
        assert value, message


class TestDatabase:
    @pytest.mark.parametrize(("cls", "error"), ERRORS)
    def test_errors(self, cls, error):
        """The same error, at the same moment, with a text that torch's test accepts."""
        given = error.optimizer_error_input
        params = [nn.Parameter(torch.ones(3, 1))] if given.params is None else given.params
        if error.error_on.name == "CONSTRUCTION_ERROR":
            if issubclass(error.error_type, Warning):
                with pytest.warns(error.error_type, match=error.error_regex):
                    cls(params, **given.kwargs)
            else:
                with pytest.raises(error.error_type, match=error.error_regex):
                    cls(params, **given.kwargs)
        else:
            optimizer = cls(params, **given.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                optimizer.step()

    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
    )
    @every_case
    def test_equal_to_torch_at_every_step(self, ours, theirs, kwargs, flatten, dtype):
        """Seven iterations, compared and aligned at each, with a missing gradient, a frozen layer
        and a scalar.
        """
        kwargs = copy.deepcopy(kwargs)
        if dtype == torch.float16:
            kwargs["eps"] = 0.1  # torch's choice: 1e-8 is zero in float16
        tracker, case = database.TensorTracker(), Assertions(dtype)
        for make in (
            lambda params: theirs(params, **plain(kwargs)),
            lambda params: ours(params, flatten=flatten, **kwargs),
        ):
            model = network(dtype)
            scalar = torch.zeros((), dtype=dtype, requires_grad=True)
            params = [*model.parameters(), scalar]
            optimizer = make(params)
            first = not tracker.tensors
            x = torch.tensor([[0.1], [0.2], [0.3], [0.4]], dtype=dtype)
            for iteration in range(7):
                optimizer.zero_grad()
                scalar.grad = torch.ones((), dtype=dtype)
                loss = model(x).sum()
                if iteration == 3 or iteration == 5:
                    for p in model[2].parameters():
                        p.requires_grad_(iteration == 5)
                    optimizer.zero_grad()
                    scalar.grad = torch.ones((), dtype=dtype)
                    loss = model(x).sum()
                loss.backward()
                if iteration == 2:
                    params[-2].grad = None
                    scalar.grad = None
                optimizer.step()
                tensors = [*params, *(v for p in params for v in optimizer.state[p].values())]
                for tensor in tensors:
                    if first:
                        tracker.add(tensor)
                    else:
                        tracker.pop_check_set(tensor, case)
        assert tracker.all_popped()

    @pytest.mark.parametrize(
        "schedulers", [None, "StepLR", "ReduceLROnPlateau", "OneCycleLR", "ExponentialLR"]
    )
    @pytest.mark.parametrize("contiguous", [True, False])
    @every_case
    def test_goes_in_the_right_direction(
        self, ours, theirs, kwargs, flatten, contiguous, schedulers
    ):
        """The loss falls (rises with maximize), also for parameters that are every second element
        of a tensor.
        """
        if (
            schedulers
            and any(isinstance(v, tuple) for v in kwargs.values())
            and schedulers == "OneCycleLR"
        ):
            kwargs = {
                key: value for key, value in kwargs.items() if key != "betas"
            }  # it writes plain betas
        weight, bias, x = (
            torch.arange(1.0, n + 1).view(shape) / 10
            for n, shape in ((50, (10, 5)), (10, (10,)), (5, (5,)))
        )
        if not contiguous:
            weight, bias = (torch.stack([t, t], dim=-1)[..., 0] for t in (weight, bias))
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        assert weight.is_contiguous() == contiguous
        optimizer = ours([weight, bias], flatten=flatten, **copy.deepcopy(kwargs))
        arguments = {
            "StepLR": {"gamma": 0.9, "step_size": 10},
            "ReduceLROnPlateau": {"threshold": 1e-4},
            "OneCycleLR": {"max_lr": 0.01, "total_steps": 30},
            "ExponentialLR": {"gamma": 0.9},
        }
        scheduler = schedulers and getattr(torch.optim.lr_scheduler, schedulers)(
            optimizer, **arguments[schedulers]
        )

        def closure():
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss.backward()
            return loss

        before = closure().item()
        for _ in range(20):
            loss = optimizer.step(closure)
            if schedulers:
                scheduler.step(*([loss.item()] if schedulers == "ReduceLROnPlateau" else []))
        after = closure().item()
        assert after > before if kwargs.get("maximize") else after < before

    @every_case
    def test_save_and_load_with_weights_only(self, ours, theirs, kwargs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten, **copy.deepcopy(kwargs))
        backward(optimizer)
        optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        other = ours(network().parameters(), flatten=flatten, **copy.deepcopy(kwargs))
        other.load_state_dict(loaded)
        assert_same_state_dicts(other.state_dict(), optimizer.state_dict())

    @every_case
    def test_state_dict_is_deterministic(self, ours, theirs, kwargs, flatten):
        """Loaded into another optimizer over copies of the parameters, both go on alike, bit for
        bit.
        """
        model = network()
        optimizer = ours(model.parameters(), flatten=flatten, **copy.deepcopy(kwargs))
        for _ in range(3):
            backward(optimizer)
            optimizer.step()
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.grad = None
        resumed = ours(twin.parameters(), flatten=flatten, **copy.deepcopy(kwargs))
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for _ in range(3):
            for each in (optimizer, resumed):
                backward(each)
                each.step()
            assert all(
                torch.equal(a, b)
                for a, b in zip(model.parameters(), twin.parameters(), strict=True)
            )
        assert_same_state_dicts(resumed.state_dict(), optimizer.state_dict())
        # And with the group repeated: twice the parameters, twice the state.
        doubled = optimizer.state_dict()
        doubled["param_groups"] = doubled["param_groups"] * 2
        with pytest.raises(ValueError, match="different number of parameter groups"):
            resumed.load_state_dict(doubled)

    @every_case
    def test_deepcopy_keeps_public_attributes(self, ours, theirs, kwargs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten, **copy.deepcopy(kwargs))
        backward(optimizer)
        optimizer.step()

        def public(optimizer):
            return {name for name in optimizer.__dict__ if not name.startswith("_")}

        assert public(copy.deepcopy(optimizer)) == public(optimizer)

    @every_case
    def test_state_is_not_empty_after_a_step(self, ours, theirs, kwargs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten, **copy.deepcopy(kwargs))
        backward(optimizer)
        optimizer.step()
        assert len(optimizer.state) == 4 and all(entry for entry in optimizer.state.values())

    @every_case
    def test_gradients_are_never_written(self, ours, theirs, kwargs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten, **copy.deepcopy(kwargs))
        backward(optimizer)
        grads = [p.grad for p in params_of(optimizer)]
        versions, values = [g._version for g in grads], [g.clone() for g in grads]
        for _ in range(5):
            optimizer.step()
        assert [g._version for g in grads] == versions
        assert all(torch.equal(a, b) for a, b in zip(grads, values, strict=True))

    @every_case
    def test_can_be_printed(self, ours, theirs, kwargs, flatten):
        kwargs = copy.deepcopy(kwargs)
        text = repr(ours(network().parameters(), flatten=flatten, **kwargs))
        expected = repr(theirs(network().parameters(), **kwargs))
        if flatten:
            expected = expected.removesuffix(")") + "flatten: True\n)"
        assert text.replace(ours.__name__, theirs.__name__, 1) == expected


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def backward(optimizer):
    """Gradients that depend on the parameters."""
    optimizer.zero_grad()
    sum((p * p * (i + 1)).sum() for i, p in enumerate(params_of(optimizer))).backward()


def assert_same_state_dicts(a, b):
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for index in b["state"]:
        assert list(a["state"][index]) == list(b["state"][index])
        assert all(
            torch.equal(a["state"][index][key], value) for key, value in b["state"][index].items()
        )


@both_classes
@flat_or_not
class TestGroups:
    @pytest.mark.parametrize(
        "schedulers",
        [
            [lambda o: torch.optim.lr_scheduler.StepLR(o, gamma=0.9, step_size=10)],
            [
                lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.4, total_iters=4),
                lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9),
            ],
            [lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5)],
        ],
    )
    def test_param_group_with_schedulers_goes_in_the_right_direction(
        self, ours, theirs, flatten, schedulers
    ):
        weight, bias, x = (
            torch.randn(10, 5).requires_grad_(),
            torch.randn(10).requires_grad_(),
            torch.randn(5),
        )
        optimizer = ours(
            [{"params": weight}, {"params": bias, "lr": 0.01}], lr=0.05, flatten=flatten
        )
        schedulers = [make(optimizer) for make in schedulers]

        def closure():
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss.backward()
            return loss

        before = closure().item()
        for _ in range(20):
            optimizer.step(closure)
            for scheduler in schedulers:
                scheduler.step()
        assert closure().item() < before

    def test_weight_decay_and_lr_of_groups(self, ours, theirs, flatten):
        runs = []
        for cls, extra in ((ours, {"flatten": flatten}), (theirs, {})):
            model = network()
            optimizer = cls(
                [
                    {"params": model[0].parameters(), "weight_decay": 0.3},
                    {"params": model[2].parameters(), "lr": 1e-28},
                ],
                lr=0.01,
                **extra,
            )
            start = [p.detach().clone() for p in model[2].parameters()]
            for _ in range(5):
                backward(optimizer)
                optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(start, model[2].parameters(), strict=True))
            runs.append([p.detach() for p in model.parameters()])
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_lr_as_a_tensor_of_any_shape(self, ours, theirs, flatten, shape):
        lr = torch.full(shape, 0.01)
        runs = []
        for cls, rate, extra in ((ours, lr, {"flatten": flatten}), (theirs, 0.01, {})):
            optimizer = cls(network().parameters(), lr=rate, **extra)
            for _ in range(5):
                backward(optimizer)
                optimizer.step()
            runs.append([p.detach() for p in params_of(optimizer)])
            if cls is ours:
                assert optimizer.param_groups[0]["lr"] is lr and optimizer.defaults["lr"] is lr
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-6, atol=1e-8
            )  # 0.01 as a float32 tensor is off by 2e-8

    def test_schedulers_write_into_a_tensor_lr(self, ours, theirs, flatten):
        lr = torch.tensor(0.1)
        optimizer = ours(network().parameters(), lr=lr, flatten=flatten)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        backward(optimizer)
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr and lr == 0.05

    @pytest.mark.parametrize("shape", [(2,), (3, 4)])
    def test_complex_equals_its_real_view(self, ours, theirs, flatten, shape):
        torch.manual_seed(0)
        a = torch.randn(shape, dtype=torch.complex64, requires_grad=True)
        b = torch.view_as_real(a.detach().clone()).requires_grad_()
        mixed = torch.randn(3, requires_grad=True)
        twin = mixed.detach().clone().requires_grad_()
        optimizers = [
            ours([a, mixed], lr=0.01, flatten=flatten),
            ours([b, twin], lr=0.01, flatten=flatten),
        ]
        for _ in range(4):
            for optimizer, (z, w) in zip(
                optimizers, ((torch.view_as_real(a), mixed), (b, twin)), strict=True
            ):
                optimizer.zero_grad()
                ((z - 1).square().sum() + w.square().sum()).backward()
                optimizer.step()
        assert torch.equal(torch.view_as_real(a.detach()), b.detach()) and torch.equal(mixed, twin)
        for key, value in optimizers[0].state[a].items():
            assert torch.equal(
                torch.view_as_real(value) if value.is_complex() else value,
                optimizers[1].state[b][key],
            )

    def test_a_step_without_gradients_changes_nothing(self, ours, theirs, flatten):
        params = [torch.randn(2, 3, requires_grad=False) for _ in range(2)]
        before = [p.clone() for p in params]
        optimizer = ours(params, lr=0.1, weight_decay=0.1, flatten=flatten)
        optimizer.step()
        assert (
            all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
            and not optimizer.state
        )

    def test_a_step_with_zero_gradients_changes_nothing_but_decay(self, ours, theirs, flatten):
        p = torch.randn(5, requires_grad=True)
        before = p.detach().clone()
        optimizer = ours([p], weight_decay=0, flatten=flatten)
        p.grad = torch.zeros_like(p)
        for _ in range(3):
            optimizer.step()
        assert torch.equal(p.detach(), before)


@both_classes
@flat_or_not
class TestCheckpoints:
    def test_older_state_dicts_load(self, ours, theirs, flatten):
        newer = ("maximize", "foreach", "fused", "differentiable", "capturable")
        optimizer = ours(network().parameters(), lr=0.1, flatten=flatten)
        backward(optimizer)
        optimizer.step()
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for key in newer:
                del group[key]
        optimizer.load_state_dict(old)
        assert all(key in optimizer.param_groups[0] for key in newer)
        backward(optimizer)
        optimizer.step()

    @pytest.mark.parametrize(("named", "loads_named"), [(False, True), (True, False), (True, True)])
    def test_named_and_unnamed_state_dicts(self, ours, theirs, flatten, named, loads_named):
        model = network()
        params = model.named_parameters() if named else model.parameters()
        other = (
            [(f"other.{n}", p) for n, p in network().named_parameters()]
            if loads_named
            else network().parameters()
        )
        a, b = ours(params, flatten=flatten), ours(other, flatten=flatten, lr=0.5)
        backward(b)
        b.step()
        a.load_state_dict(b.state_dict())
        names = a.param_groups[0].get("param_names")
        if loads_named:
            assert names == [f"other.{n}" for n, _ in model.named_parameters()]
        else:
            assert names == [n for n, _ in model.named_parameters()]
        assert a.param_groups[0]["lr"] == 0.5
        backward(a)
        a.step()

    def test_a_plain_number_for_the_step_loads(self, ours, theirs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten)
        backward(optimizer)
        optimizer.step()
        state = optimizer.state_dict()
        for entry in state["state"].values():
            entry["step"] = entry["step"].item()
        optimizer.load_state_dict(state)
        assert all(
            torch.is_tensor(entry["step"]) and entry["step"] == 1
            for entry in optimizer.state.values()
        )

    def test_decoupled_decay_between_adam_and_adamw(self, ours, theirs, flatten):
        """An Adam keeps what an AdamW's checkpoint says; an AdamW stays one whatever it loads."""
        adamw = FusedAdamW(network().parameters(), flatten=flatten)
        adam = FusedAdam(network().parameters(), flatten=flatten)
        adam.load_state_dict(adamw.state_dict())
        assert adam.param_groups[0]["decoupled_weight_decay"] is True
        adamw.load_state_dict(FusedAdam(network().parameters()).state_dict())
        assert adamw.param_groups[0]["decoupled_weight_decay"] is True
        with_default = FusedAdam(network().parameters())
        with_default.load_state_dict(theirs(network().parameters()).state_dict())
        assert with_default.param_groups[0]["decoupled_weight_decay"] is (
            theirs is torch.optim.AdamW
        )

    def test_load_casts_to_the_parameters_dtype_and_device(self, ours, theirs, flatten):
        source = theirs(network(torch.float64).parameters())
        backward(source)
        source.step()
        target = ours(network(torch.float32).parameters(), flatten=flatten)
        target.load_state_dict(source.state_dict())
        for entry in target.state.values():
            assert (
                entry["exp_avg"].dtype
                == entry["exp_avg_sq"].dtype
                == entry["step"].dtype
                == torch.float32
            )
        backward(target)
        target.step()

    @pytest.mark.parametrize("prepend", [False, True])
    def test_hooks_on_state_dicts(self, ours, theirs, flatten, prepend):
        optimizer = ours(network().parameters(), lr=0.1, flatten=flatten)
        backward(optimizer)
        optimizer.step()
        order = []

        def replace_lr(optimizer, state):
            order.append("replace")
            state["param_groups"][0]["lr"] = 0.002

        optimizer.register_load_state_dict_pre_hook(lambda o, s: order.append("first"))
        handle = optimizer.register_load_state_dict_pre_hook(replace_lr, prepend=prepend)
        optimizer.register_load_state_dict_post_hook(
            lambda o: order.append(o.param_groups[0]["lr"])
        )
        optimizer.load_state_dict(optimizer.state_dict())
        assert order == (["replace", "first", 0.002] if prepend else ["first", "replace", 0.002])
        handle.remove()
        optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
        assert optimizer.state_dict()["extra"] == 1


@both_classes
@flat_or_not
class TestHooks:
    def test_order_of_step_hooks(self, ours, theirs, flatten):
        data = []
        handles = [
            register_optimizer_step_pre_hook(lambda o, args, kwargs: data.append(0)),
            register_optimizer_step_post_hook(lambda o, args, kwargs: data.append(5)),
        ]
        optimizer = ours(network().parameters(), flatten=flatten)
        optimizer.register_step_pre_hook(lambda o, args, kwargs: data.append(1))
        optimizer.register_step_post_hook(lambda o, args, kwargs: data.append(2))
        optimizer.step()
        for handle in handles:
            handle.remove()
        optimizer.step()
        assert data == [0, 1, 2, 5, 1, 2]  # once each, also without gradients

    def test_pre_hooks_may_replace_arguments(self, ours, theirs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten)
        seen = []

        def closure():
            seen.append("closure")
            return torch.ones(())

        handle = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, closure), {}))
        assert optimizer.step() == 1 and seen == ["closure"]
        handle.remove()
        optimizer.register_step_pre_hook(lambda o, args, kwargs: 5)
        with pytest.raises(RuntimeError, match=r"must return None or a tuple of .*but got 5"):
            optimizer.step()

    def test_names_in_the_profiler(self, ours, theirs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten)
        backward(optimizer)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
            optimizer.zero_grad()
        names = {event.name for event in profile.events()}
        assert f"Optimizer.step#{ours.__name__}.step" in names
        assert f"Optimizer.zero_grad#{ours.__name__}.zero_grad" in names

    def test_keyword_closure_and_hooks_after_schedulers(self, ours, theirs, flatten):
        optimizer = ours(network().parameters(), flatten=flatten)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps step
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backward(optimizer)
            assert optimizer.step(closure=None) is None
            assert optimizer.step(closure=lambda: 3.0) == 3.0


@both_classes
def test_inference_tensors_are_stepped(ours, theirs):
    with torch.inference_mode():
        param = torch.ones(3)
        param.grad = torch.ones(3)
    optimizer = ours([param], lr=0.1)
    for steps in (1, 2):
        with torch.inference_mode():
            optimizer.step()
        assert optimizer.state[param]["step"] == steps
    assert (param < 1).all()


@flat_or_not
def test_inference_mode_leaves_nothing_behind(flatten):
    """What a step makes inside inference mode is used outside it by the next."""
    params = [torch.ones(3, requires_grad=True), torch.ones(4, 4, requires_grad=True)]
    optimizer = FusedAdam(params, flatten=flatten)
    for mode in (True, False):
        for p in params:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
        with torch.inference_mode(mode):
            optimizer.step()
    assert optimizer.state[params[0]]["step"] == 2


@both_classes
def test_zero_grad_without_set_to_none(ours, theirs):
    optimizer = ours(network().parameters())
    backward(optimizer)
    grads = [p.grad for p in params_of(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    assert all(
        p.grad is g and not g.any() for p, g in zip(params_of(optimizer), grads, strict=True)
    )
    optimizer.zero_grad()
    assert all(p.grad is None for p in params_of(optimizer))
