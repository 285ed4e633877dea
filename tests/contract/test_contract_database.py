"""torch's contract: its own optimizer database, run against both classes.

Configurations and error inputs come from `torch.testing._internal.common_optimizers`; the tests
follow, in own words, those of torch's test_optim.py that do not need a GPU. Every test runs with
`flatten` off and on.
"""

import copy
import io

import pytest
import torch
from class_pairs import PAIRS, backward, network, params_of
from torch import nn

from fused_adam import FusedAdam, FusedAdamW

# It imports expecttest, which only torch's own tests need: a machine with a GPU may lack it.
database = pytest.importorskip("torch.testing._internal.common_optimizers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:optimizer contains a parameter group with duplicate parameters"
)

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


def assert_same_state_dicts(a, b):
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for index in b["state"]:
        assert list(a["state"][index]) == list(b["state"][index])
        assert all(
            torch.equal(a["state"][index][key], value) for key, value in b["state"][index].items()
        )
