"""The promise in one number: SHA-256 of all weights and moments after a fixed training, whoever
computes it. Training and hash stand in bench/verify.py, which checks them on any machine.
"""

import copy
import io

import pytest
import torch
from hashes import (
    CAUTIOUS_HASH,
    CAUTIOUS_SHORT_HASH,
    EMA_HASH,
    EMA_SHORT_HASH,
    RECIPE_HASHES,
    RECIPE_STEPS,
    of_recipe,
    optimizer_of,
)

from bench.verify import (
    HASH,
    SHORT_HASH,
    SHORT_STEPS,
    STEPS,
    digest,
    start,
    train,
)


def run(steps, device="cpu", only=None, **arguments):
    params = start(device, only)
    optimizer = optimizer_of(params, **arguments)
    train(params, optimizer, steps)
    return digest(params, optimizer)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_thousand_steps_on_the_host(backend, flatten):
    assert run(STEPS, backend=backend, flatten=flatten) == HASH


@pytest.mark.parametrize("flatten", [False, True])
def test_short_hash_on_the_reference(flatten):
    assert run(SHORT_STEPS, backend="reference", flatten=flatten) == SHORT_HASH


@pytest.mark.parametrize("flatten", [False, True])
def test_short_hash_on_the_kernel(flatten, kernel_device):
    assert run(SHORT_STEPS, kernel_device, backend="triton", flatten=flatten) == SHORT_HASH


@pytest.mark.parametrize("backend", ["reference", "compiled"])
def test_thousand_cautious_steps_on_the_host(backend):
    assert run(STEPS, backend=backend, cautious=True) == CAUTIOUS_HASH


def test_short_cautious_hash_on_the_kernel(kernel_device):
    steps = run(SHORT_STEPS, kernel_device, backend="triton", cautious=True)
    assert steps == CAUTIOUS_SHORT_HASH


@pytest.mark.parametrize(("backend", "flatten"), [("reference", False), ("compiled", True)])
def test_thousand_averaged_steps_on_the_host(backend, flatten):
    assert run(STEPS, backend=backend, flatten=flatten, averaged=True) == EMA_HASH


def test_short_averaged_hash_on_the_kernel(kernel_device):
    steps = run(SHORT_STEPS, kernel_device, backend="triton", flatten=True, averaged=True)
    assert steps == EMA_SHORT_HASH


@pytest.mark.gpu
@pytest.mark.parametrize("flatten", [False, True])
def test_thousand_averaged_steps_on_a_gpu(flatten):
    assert run(STEPS, "cuda", backend="triton", flatten=flatten, averaged=True) == EMA_HASH


@pytest.mark.gpu
def test_thousand_cautious_steps_on_a_gpu():
    assert run(STEPS, "cuda", backend="triton", cautious=True) == CAUTIOUS_HASH


@pytest.mark.gpu
@pytest.mark.parametrize("flatten", [False, True])
def test_thousand_steps_on_a_gpu(flatten):
    assert run(STEPS, "cuda", backend="triton", flatten=flatten) == HASH


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    "arrangement", [{"permuted": True}, {"split": True}, {"permuted": True, "split": True}]
)
def test_order_and_grouping_do_not_matter(arrangement, flatten):
    assert run(STEPS, flatten=flatten, **arrangement) == HASH


@pytest.mark.parametrize("flatten", [False, True])
def test_saved_and_resumed_in_the_middle(flatten):
    params = start("cpu")
    optimizer = optimizer_of(params, flatten=flatten)
    train(params, optimizer, 400)
    file = io.BytesIO()
    torch.save({"params": dict(params), "optimizer": optimizer.state_dict()}, file)
    del params, optimizer
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    # The other layout takes over: a checkpoint does not depend on it.
    resumed = optimizer_of(saved["params"], flatten=not flatten)
    resumed.load_state_dict(saved["optimizer"])
    train(saved["params"], resumed, STEPS - 400, first=400)
    assert digest(saved["params"], resumed) == HASH


def test_a_copied_optimizer_continues_alike():
    params = start("cpu")
    optimizer = optimizer_of(params)
    train(params, optimizer, 10)
    params, optimizer = copy.deepcopy((params, optimizer))
    train(params, optimizer, SHORT_STEPS - 10, first=10)
    assert digest(params, optimizer) == SHORT_HASH


def test_training_stays_finite_and_moves():
    """A hash of NaNs, or of parameters that stand still, would promise little."""
    params, before = start("cpu"), start("cpu")
    train(params, optimizer_of(params), STEPS)
    for name, param in params.items():
        assert param.isfinite().all()
        assert (param != before[name]).double().mean() > 0.9


def test_one_bit_changes_the_hash():
    """The digest sees every element."""
    params = start("cpu")
    optimizer = optimizer_of(params)
    train(params, optimizer, 1)
    before = digest(params, optimizer)
    moment = optimizer.state[params["131-bfloat16-1"]]["max_exp_avg_sq"]
    moment.view(torch.int16)[130] ^= 1
    assert digest(params, optimizer) != before


@pytest.mark.parametrize("precision", RECIPE_HASHES)
def test_every_recipe_has_a_hash_of_its_own(precision):
    assert run(RECIPE_STEPS, **of_recipe(precision)) == RECIPE_HASHES[precision]


@pytest.mark.parametrize("precision", RECIPE_HASHES)
def test_recipes_saved_and_resumed_in_flat_buffers_and_other_groups(precision):
    arguments = of_recipe(precision)
    params = start("cpu", arguments.pop("only"))
    optimizer = optimizer_of(params, flatten=True, halved=True, **arguments)
    train(params, optimizer, 20)
    file = io.BytesIO()
    torch.save({"params": dict(params), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = optimizer_of(saved["params"], halved=True, **arguments)
    resumed.load_state_dict(saved["optimizer"])
    train(saved["params"], resumed, RECIPE_STEPS - 20, first=20)
    assert digest(saved["params"], resumed) == RECIPE_HASHES[precision]


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8"])
def test_recipes_for_two_steps_on_the_kernel(precision):
    arguments = of_recipe(precision)
    assert run(2, backend="triton", **arguments) == run(2, backend="reference", **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", RECIPE_HASHES)
def test_recipes_on_a_gpu(precision):
    assert (
        run(RECIPE_STEPS, "cuda", backend="triton", **of_recipe(precision))
        == RECIPE_HASHES[precision]
    )
