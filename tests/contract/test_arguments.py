"""Arguments and param groups as users write them: numpy's numbers, one-element tensors, functions
to pickle.
"""

import copy
import functools
import io
import os
import pickle
import subprocess
import sys

import numpy
import pytest
import torch
from training import parameters, results, same_bits, train

from fused_adam import FusedAdam, FusedAdamW

SHAPES = [(3,), (33, 5)]
backends = pytest.mark.parametrize("backend", ["reference", "triton"])


def optimizer_of(**arguments):
    return FusedAdamW(parameters(torch.float32, SHAPES), **{"lr": 0.1, **arguments})


@pytest.mark.parametrize(
    ("argument", "attribute", "value", "stored"),
    [
        ("max_grad_norm", "_max_grad_norm", numpy.float32(0.1), 0.10000000149011612),
        ("max_grad_norm", "_max_grad_norm", numpy.float64(0.1), 0.1),
        ("max_grad_norm", "_max_grad_norm", numpy.float16(0.5), 0.5),
        ("max_grad_norm", "_max_grad_norm", numpy.int64(2), 2.0),
        ("max_grad_norm", "_max_grad_norm", numpy.array(2.0), 2.0),
        ("max_grad_norm", "_max_grad_norm", torch.tensor(2.0), 2.0),
        ("max_grad_norm", "_max_grad_norm", 2, 2.0),
        ("max_grad_norm", "_max_grad_norm", float("inf"), float("inf")),
        ("seed", "_seed", numpy.int64(7), 7),
        ("seed", "_seed", numpy.uint8(7), 7),
        ("seed", "_seed", numpy.array(7), 7),
        ("seed", "_seed", numpy.uint64(2**63 - 1), 2**63 - 1),
        ("flatten", "_flatten", numpy.True_, True),
        ("flatten", "_flatten", numpy.False_, False),
        ("skip_nonfinite", "_skip_nonfinite", numpy.True_, True),
        ("skip_nonfinite", "_skip_nonfinite", numpy.array(True), True),
    ],
)
def test_numbers_of_numpys_are_stored_as_pythons(argument, attribute, value, stored):
    optimizer = optimizer_of(**{argument: value})
    kept = getattr(optimizer, attribute)
    assert kept == stored and type(kept) is type(stored)
    train(optimizer, 1)
    other = optimizer_of(**{argument: stored})
    train(other, 1)
    assert same_bits(results(optimizer), results(other))


def test_a_seed_of_numpys_can_be_saved_and_loaded_safely():
    optimizer = FusedAdam(
        parameters(torch.bfloat16, SHAPES), precision="sr-bf16", seed=numpy.int64(5)
    )
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # refuses numpy's numbers
    assert saved["param_groups"][0]["seed"] == 5
    # A checkpoint that somebody wrote by hand.
    saved["param_groups"][0]["seed"] = numpy.int64(6)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["seed"] == 6 and type(optimizer.param_groups[0]["seed"]) is int


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        *(
            (
                "max_grad_norm",
                value,
                ValueError,
                "max_grad_norm=.* must be a number above 0, or None for no clipping",
            )
            for value in (
                *(
                    numpy.float32("nan"),
                    numpy.float32(0),
                    numpy.float64(-1),
                    numpy.True_,
                    numpy.ones(2),
                    numpy.str_("1"),
                ),
                *(
                    torch.tensor(True),
                    torch.ones(2),
                    torch.tensor(1j),
                    1j,
                    10**400,
                    -(10**400),
                    [1.0],
                    object(),
                ),
            )
        ),
        *(
            ("seed", value, ValueError, r"seed=.* must be a whole number from 0 to 2\*\*63 - 1")
            for value in (
                *(
                    numpy.float64(1),
                    numpy.True_,
                    numpy.int64(-1),
                    numpy.uint64(2**63),
                    numpy.ones(2, int),
                    "7",
                    None,
                ),
                *(torch.tensor(True), torch.tensor(1.0)),
            )
        ),
        *(
            (name, value, TypeError, f"{name}=.* must be True or False")
            for name in ("flatten", "skip_nonfinite")
            for value in (
                numpy.int64(1),
                numpy.array([True]),
                numpy.float32(1),
                1,
                0,
                "True",
                None,
                torch.tensor(True),
            )
        ),
    ],
)
def test_what_is_no_number_or_flag_is_refused(argument, value, error, message):
    with pytest.raises(error, match=message):
        optimizer_of(**{argument: value})


def test_numpy_is_not_imported():
    code = (
        "import sys; sys.modules['numpy'] = None; import torch; from fused_adam import FusedAdam; "
        "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3); "
        "FusedAdam([p], max_grad_norm=1.0, seed=3, flatten=False, backend='reference').step()"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # where nothing is installed
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


@backends
def test_an_infinite_max_grad_norm_measures_and_clips_nothing_as_in_torch(backend):
    measured, plain = (
        optimizer_of(backend=backend, max_grad_norm=float("inf")),
        optimizer_of(backend=backend),
    )
    train(measured, 2)
    train(plain, 2)
    assert same_bits(results(measured), results(plain))
    grads = [param.grad for group in plain.param_groups for param in group["params"]]
    assert measured.grad_norm.item() == pytest.approx(
        torch.nn.utils.get_total_norm(grads).item(), rel=1e-6
    )


# What a param group may hold, from a user or a checkpoint, and the numbers that it means.
VALUES = [
    {"lr": numpy.float32(0.5)},
    {"lr": numpy.array(0.5)},
    {"lr": numpy.array([0.5])},
    {"lr": numpy.float16(0.5), "eps": numpy.float64(0.5), "weight_decay": numpy.int64(1)},
    {"lr": torch.tensor([0.5]), "eps": torch.tensor([0.5]), "weight_decay": torch.tensor([[0.5]])},
    {
        "lr": torch.tensor(0.5),
        "eps": torch.tensor(0.5, dtype=torch.float64),
        "weight_decay": torch.tensor(1),
    },
    {"betas": numpy.array([0.5, 0.75])},
    {"betas": torch.tensor([0.5, 0.75])},
    {"betas": torch.tensor([[0.5], [0.75]])},
    {"betas": [torch.tensor([0.5]), numpy.float32(0.75)]},
    {"betas": (numpy.array([0.5]), numpy.array(0.75))},
    {"lr": 1, "eps": 1, "weight_decay": 0},
]
each_value = pytest.mark.parametrize("values", VALUES, ids=str)


def as_floats(values):
    """The same numbers as floats and tuples of floats."""
    return {
        key: tuple(float(numpy.asarray(x).item()) for x in value)
        if key == "betas"
        else numpy.asarray(value).item()
        for key, value in values.items()
    }


@backends
@each_value
def test_a_param_group_takes_the_numbers_that_torch_takes(backend, values):
    odd, usual = optimizer_of(backend=backend), optimizer_of(backend=backend)
    for optimizer in (odd, usual):
        train(optimizer, 1)
    odd.param_groups[0].update(values)
    usual.param_groups[0].update(as_floats(values))
    for optimizer in (odd, usual):
        train(optimizer, 2, first=1)
    assert same_bits(results(odd), results(usual))


@backends
@each_value
def test_a_checkpoint_may_hold_the_numbers_that_torch_takes(backend, values):
    odd, usual = optimizer_of(backend=backend), optimizer_of(backend=backend)
    for optimizer, numbers in ((odd, values), (usual, as_floats(values))):
        train(optimizer, 1)
        checkpoint = optimizer.state_dict()
        checkpoint["param_groups"][0].update(numbers)
        torch.optim.AdamW(parameters(torch.float32, SHAPES)).load_state_dict(checkpoint)
        optimizer.load_state_dict(checkpoint)
        train(optimizer, 2, first=1)
    assert same_bits(results(odd), results(usual))


@pytest.mark.parametrize(
    "values",
    [
        *(
            {"lr": value}
            for value in (
                "0.1",
                None,
                numpy.ones(2),
                torch.ones(2),
                torch.tensor(1j),
                numpy.array("a"),
                1j,
            )
        ),
        *({"eps": value} for value in ([1.0], numpy.ones(0), numpy.array(None))),
        *(
            {"betas": value}
            for value in (
                0.9,
                torch.tensor(0.9),
                torch.ones(3),
                numpy.ones((2, 2)),
                "ab",
                {1: 2, 3: 4},
            )
        ),
        {"betas": numpy.array(["a", "b"])},
    ],
    ids=str,
)
def test_a_checkpoint_with_other_things_for_numbers_is_refused(values):
    optimizer = optimizer_of()
    train(optimizer, 1)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    checkpoint["param_groups"][0].update(values)
    with pytest.raises(
        ValueError, match=f"'{next(iter(values))}' in param_groups.0. of the state_dict must be "
    ):
        optimizer.load_state_dict(checkpoint)


def double(total):
    return 2 * total


class Trainer:
    """Holds the optimizer whose norm it adds up, and what no process can copy."""

    def __init__(self, *parts):
        self.parts = parts
        self.optimizer = optimizer_of(max_grad_norm=1.0)
        self.optimizer.reduce_norm = self.reduce

    def reduce(self, total):
        return 2 * total


def uncopyable():
    return sys._getframe()  # as a process group: neither copied nor pickled


def reducing(function):
    optimizer = optimizer_of(max_grad_norm=1.0)
    optimizer.reduce_norm = function
    train(optimizer, 1)
    return optimizer


FUNCTIONS = {
    "lambda": lambda: lambda total: 2 * total,
    "local": lambda: functools.partial(lambda total, factor: factor * total, factor=2),
    "argument": lambda: functools.partial(lambda total, frame: 2 * total, frame=uncopyable()),
    "method": lambda: Trainer(uncopyable()).reduce,
}


@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy])
def test_a_copy_keeps_reduce_norm(make, duplicate):
    function = make()
    optimizer = reducing(function)
    copied = duplicate(optimizer)
    assert optimizer.reduce_norm is function
    assert callable(copied.reduce_norm) and copied.reduce_norm(torch.ones(1)) == 2
    for each in (optimizer, copied):
        train(each, 1, first=1)
        if duplicate is copy.copy:
            break  # both hold the same parameters
    if duplicate is copy.deepcopy:
        assert same_bits(results(optimizer), results(copied))
        assert torch.equal(optimizer.grad_norm, copied.grad_norm)


def test_a_copied_trainer_reduces_by_its_own_method():
    copied = copy.deepcopy(Trainer())
    assert copied.optimizer.reduce_norm.__self__ is copied


@pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    "save", [pickle.dumps, lambda optimizer: torch.save(optimizer, io.BytesIO())]
)
def test_a_reduce_norm_that_cannot_be_pickled_is_named(make, save):
    optimizer = reducing(make())
    with pytest.raises(
        pickle.PicklingError,
        match=r"^reduce_norm=.* cannot be pickled \(.*\): make it a function at the top level of a "
        r"module, or set reduce_norm = None before and set it again after; "
        r"state_dict\(\) never contains it$",
    ):
        save(optimizer)
    optimizer.state_dict()
    optimizer.reduce_norm = None  # the cure
    save(optimizer)


@pytest.mark.parametrize("function", [None, double, functools.partial(torch.mul, other=2)])
def test_a_reduce_norm_that_can_be_pickled_is(function):
    optimizer = reducing(function)
    copied = pickle.loads(pickle.dumps(optimizer))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for each in (copied, torch.load(file, weights_only=False)):
        assert (each.reduce_norm is None) == (function is None)
        train(each, 1, first=1)
    train(optimizer, 1, first=1)
    assert same_bits(results(optimizer), results(copied))


def test_a_trainer_is_pickled_with_its_optimizer():
    copied = pickle.loads(pickle.dumps(Trainer()))
    assert copied.optimizer.reduce_norm.__self__ is copied
    with pytest.raises(pickle.PicklingError, match="reduce_norm"):
        pickle.dumps(Trainer(uncopyable()).optimizer)
    assert (
        pickle.loads(pickle.dumps(Trainer())).optimizer.reduce_norm(1) == 2
    )  # an error leaves nothing behind


def test_random_bits_are_keyed_by_seed_and_position_in_the_optimizer():
    """As the docstring of `seed` and docs/precision.md say."""

    def weights(*seeds):
        """Equal parameters after a step: in an optimizer each, or together in the first one without
        seeds.
        """
        params = [
            torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
            for _ in range(len(seeds) or 2)
        ]
        for param in params:
            param.grad = torch.ones_like(param)
        for members, seed in (
            zip(([p] for p in params), seeds, strict=True) if seeds else ((params, 0),)
        ):
            FusedAdam(members, lr=1e-3, precision="sr", seed=seed).step()
        return params

    first, second = weights(0, 0)
    assert torch.equal(first, second)
    first, second = weights(0, 1)
    assert not torch.equal(first, second)
    first, second = weights()
    assert not torch.equal(first, second)
