"""The promise in one number: SHA-256 of all weights and moments after a fixed training, whoever
computes it.

The gradients come from integer arithmetic, so that no random generator of any version takes part.
"""

import copy
import hashlib
import io

import pytest
import torch

from fused_adam import FusedAdam

STEPS = 1000
SHORT_STEPS = 30  # the interpreter takes milliseconds per program
HASH = "869091b3e33581671e0dc8a745e4edf241f38d0f87a8d85883fe6f45228027af"
SHORT_HASH = "55aa245e1e179c7e87e83c9fd087e61927c7bbbc6edc9613fd60d453ec24a92f"
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

# name -> (numel, dtype, group): sizes around a vector, a slot and nothing.
GROUPS = [
    {"weight_decay": 0.1},
    {"weight_decay": 0.01, "amsgrad": True, "lr": 3e-3},
    {"weight_decay": 0.1, "decoupled_weight_decay": False, "betas": (0.8, 0.99), "maximize": True},
]
PARAMS = {
    f"{numel}-{dtype}-{group}": (numel, getattr(torch, dtype), group)
    for group in range(len(GROUPS))
    for dtype in ("float32", "bfloat16")
    for numel in (1, 131, 1000)
}


def noise(numel, seed):
    """Numbers in [-1, 1), equal on every machine: a multiplicative hash, exactly scaled."""
    x = (torch.arange(numel, dtype=torch.int64) + 1) * 2654435761 + seed * 40503
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    x = (x ^ (x >> 13)) * 3266489917 % 2**32
    return (x ^ (x >> 16)).double() / 2**31 - 1


def start(device, only=None):
    """The parameters of one dtype, or of all."""
    return {
        name: torch.nn.Parameter(noise(numel, seed).to(dtype).to(device))
        for seed, (name, (numel, dtype, _)) in enumerate(PARAMS.items())
        if only in (None, dtype)
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
        members = [params[name] for name in names if name in params and PARAMS[name][2] == number]
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


def train(params, optimizer, steps, first=0):
    """The learning rate changes as a scheduler's would; gradients follow the weights, so that
    errors would grow.
    """
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * (1 - step / 2000)
        for seed, param in enumerate(params.values()):
            wave = noise(param.numel(), 100 + seed + 1000 * step).float().to(param.device)
            grad = (0.5 * param.detach().float() + wave).to(param.dtype)
            if param.grad is None:
                param.grad = grad
            else:
                param.grad.copy_(grad)
        optimizer.step()


def digest(params, optimizer):
    """Over weights and state in one order, whatever the optimizer's."""
    sha = hashlib.sha256()
    for name in params:
        for key, value in {"param": params[name].detach(), **optimizer.state[params[name]]}.items():
            sha.update(f"{name} {key}".encode())
            sha.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


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
