"""The promise in one number: SHA-256 of all weights and moments after a fixed training, whoever
computes it. Training and hash stand in bench/verify.py, which checks them on any machine.
"""

import copy
import io

import pytest
import torch

from bench.verify import (
    GROUPS,
    HASH,
    PARAMS,
    SHORT_HASH,
    SHORT_STEPS,
    STEPS,
    digest,
    start,
    train,
)
from fused_adam import FusedAdam

# Per precision recipe, over the bfloat16 parameters alone (float32 ones for native weights). The
# host takes 3 ms per parameter and step for the random bits and codes; the order of the parameters
# matters to those.
RECIPE_STEPS = 50
RECIPE_HASHES = {
    "split32": "20642616675d8d93e13e38afe1af1ca09e212295d946b8f617d24a5127e530b8",
    "split32-bf16": "691d5b79876a89218b88122b68e87bd2390d36438fc7dd6d8dc6a2633ccf4d23",
    "split24-bf16": "9ad3d5dcf3344e13de87e853857a4a1797aedf1cf593ee0127cd554111461f52",
    "sr-bf16": "a89ba37a2c76ac4483db4453466d3b15de7dfffa32a68b8ba1930b49cf809fe7",
    "split24-int8": "e71bc3b8e97a8f2f841e783f2559e9dc0d28536a6fc7bb82001437f0bfddb96f",
    "master32": "0d954c8fda1c137d6eb45479d689d45c3b724e8321aa497f13ca3c1c4aa564eb",
    "native-bf16": "f55507509d2b3bf8d614a20e37f4d56b3ed7ac99ec2e5701a0e86cc8671e243d",
    "native-int8": "53cf49cb4900aa13aec3d7a613b80380e2f8bdc1465aeaa9130a3aa7c8542a50",
}


def optimizer_of(params, split=False, permuted=False, halved=False, **arguments):
    """The same parameters with the same options, in whatever order and grouping; `halved` keeps the
    order.
    """
    names = list(PARAMS)
    if permuted:
        names = names[7:][::-1] + names[:7]
    groups = []
    for number, options in enumerate(GROUPS):
        members = [
            params[name] for name in names if name in params and PARAMS[name].group == number
        ]
        parts = (
            [members[::2], members[1::2]]
            if split
            else [members[:1], members[1:]]
            if halved
            else [members]
        )
        groups += [{"params": part, **options} for part in parts]
    if permuted:
        groups.reverse()
    return FusedAdam(groups, lr=1e-2, decoupled_weight_decay=True, **arguments)


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


def of_recipe(precision):
    return {
        "precision": precision,
        "only": torch.float32 if precision.startswith("native") else torch.bfloat16,
    }


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
