"""The promise in one number: SHA-256 of all weights and moments after a fixed training, whoever computes it.

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
    """Numbers in [-1, 1), the same on every machine: a multiplicative hash, then an exact scaling."""
    x = (torch.arange(numel, dtype=torch.int64) + 1) * 2654435761 + seed * 40503
    x = (x ^ (x >> 15)) * 2246822519 % 2**32
    x = (x ^ (x >> 13)) * 3266489917 % 2**32
    return (x ^ (x >> 16)).double() / 2**31 - 1


def start(device):
    return {
        name: torch.nn.Parameter(noise(numel, seed).to(dtype).to(device))
        for seed, (name, (numel, dtype, _)) in enumerate(PARAMS.items())
    }


def optimizer_of(params, split=False, permuted=False, **arguments):
    """The same parameters with the same options, in whatever order and grouping."""
    names = list(PARAMS)
    if permuted:
        names = names[7:][::-1] + names[:7]
    groups = []
    for number, options in enumerate(GROUPS):
        members = [params[name] for name in names if PARAMS[name][2] == number]
        parts = [members[::2], members[1::2]] if split else [members]
        groups += [{"params": part, **options} for part in parts]
    if permuted:
        groups.reverse()
    return FusedAdam(groups, lr=1e-2, decoupled_weight_decay=True, **arguments)


def train(params, optimizer, steps, first=0):
    """The learning rate changes as a scheduler's would; gradients follow the weights, so that errors would grow."""
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
    for name in PARAMS:
        for key, value in {"param": params[name].detach(), **optimizer.state[params[name]]}.items():
            sha.update(f"{name} {key}".encode())
            sha.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def run(steps, device="cpu", **arguments):
    params = start(device)
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
@pytest.mark.parametrize("arrangement", [{"permuted": True}, {"split": True}, {"permuted": True, "split": True}])
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
