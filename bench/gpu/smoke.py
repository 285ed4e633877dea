"""Single promises of FusedAdamW on a GPU, each alone, one line each: a failure names what broke.

    python smoke.py [PROMISE ...]

Before anything that takes longer. It uses the public interface alone.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fused_adam import FusedAdamW, step_in_backward

GPU, FP32 = torch.device("cuda"), torch.float32
SIZES = ((33, 70), (1,), (1025,), (5,))
# After these words of CUDA nothing in the process works any more.
FATAL = (
    "illegal memory access",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
)


def parameters(dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """The same on every device."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.nn.Parameter(
            torch.randn(size, generator=generator, device="cpu").to(dtype).to(device)
        )
        for size in SIZES
    ]


def set_grads(params: Sequence[torch.Tensor], step: int) -> None:
    """The same on every device, another at each step; into the gradient that is there, if there is
    one.
    """
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        values = torch.randn(param.shape, generator=generator, device="cpu")
        grad = values.to(param.dtype).to(param.device)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def trained(
    device: torch.device, dtype: torch.dtype = torch.float32, steps: int = 3, **options: Any
) -> FusedAdamW:
    """An optimizer after some steps."""
    params = parameters(dtype, device)
    optimizer = FusedAdamW(params, lr=1e-2, weight_decay=0.1, **options)
    for step in range(steps):
        optimizer.zero_grad()
        set_grads(params, step)
        optimizer.step()
    return optimizer


def tensors(optimizer: FusedAdamW) -> list[torch.Tensor]:
    """Parameters and state, on the host."""
    params = optimizer.param_groups[0]["params"]
    state = [value for param in params for value in optimizer.state[param].values()]
    return [tensor.detach().cpu() for tensor in (*params, *state)]


def same_bits(dtype: torch.dtype = torch.float32, **options: Any) -> FusedAdamW:
    """The GPU's optimizer, whose bits are the CPU's."""
    on_cpu, on_gpu = trained(torch.device("cpu"), dtype, **options), trained(GPU, dtype, **options)
    pairs = zip(tensors(on_cpu), tensors(on_gpu), strict=True)
    wrong = sum(not torch.equal(a, b) for a, b in pairs)
    assert not wrong, f"{wrong} tensors have other bits than on the CPU"
    return on_gpu


def nothing_waits() -> None:
    optimizer = trained(GPU, max_grad_norm=1.0, skip_nonfinite=True)
    set_grads(optimizer.param_groups[0]["params"], 9)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(flatten: bool) -> None:
    """Replays equal eager steps, with a learning rate that changes between them."""
    rates = (1e-2, 5e-3, 1e-3)
    results = []
    for graphed in (False, True):
        params = parameters(torch.float32, GPU)
        rate = torch.tensor(1e-2, device=GPU)
        optimizer = FusedAdamW(params, lr=rate, capturable=True, flatten=flatten)
        optimizer.zero_grad()
        set_grads(params, 0)
        optimizer.step()
        call: Callable[[], object] = optimizer.step
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            call = graph.replay
        for value in rates:
            rate.fill_(value)
            call()
        torch.cuda.synchronize()
        results.append(tensors(optimizer))
    assert all(map(torch.equal, *results)), "replays have other bits than eager steps"


def in_backward() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Linear(33, 2)).to(GPU)
    optimizer = FusedAdamW(model.parameters())
    handle = step_in_backward(model, optimizer)
    for _ in range(2):
        model(torch.ones(4, 16, device=GPU)).square().mean().backward()
        optimizer.step()
    steps = {int(entry["step"]) for entry in optimizer.state.values()}
    assert steps == {2} and all(param.grad is None for param in model.parameters())
    del handle


def scaler() -> None:
    model = torch.nn.Linear(16, 4).to(GPU)
    optimizer = FusedAdamW(model.parameters(), fused=True)
    scale = torch.amp.GradScaler("cuda")
    for poison in (1.0, float("inf"), 1.0):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(torch.ones(2, 16, device=GPU)).square().mean() * poison
        scale.scale(loss).backward()
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad()
    assert optimizer.state[model.weight]["step"] == 2, "a step that overflowed was counted"


def offloaded() -> None:
    plain, moved = trained(GPU), trained(GPU)
    moved.offload()
    moved.reload()
    for optimizer in (plain, moved):
        set_grads(optimizer.param_groups[0]["params"], 7)
        optimizer.step()
    assert all(map(torch.equal, tensors(plain), tensors(moved))), "other bits than without it"


def streamed() -> None:
    """State on the host, in more pieces than there are buffers; read while copies may run."""
    options: dict[str, Any] = {"lr": 1e-2, "max_grad_norm": 1.0}
    both: list[list[torch.Tensor]] = []
    on_host: dict[str, Any] = {"state_device": "cpu", "stream_bytes": 1 << 20}
    for more in ({}, on_host):
        params = [torch.nn.Parameter(torch.ones(500_001, device=GPU)), *parameters(FP32, GPU)]
        optimizer = FusedAdamW(params, **options, **more)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        entries = optimizer.state.values()
        both.append([*params, *(entry[key] for entry in entries for key in sorted(entry))])
        assert all(entry["exp_avg"].is_cpu == bool(more) for entry in entries), "state elsewhere"
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*both, strict=True)), "other bits"


def resumed() -> None:
    """Through a checkpoint of torch's own form."""
    whole, half = trained(GPU, steps=4), trained(GPU, steps=2)
    params = [
        torch.nn.Parameter(param.detach().clone()) for param in half.param_groups[0]["params"]
    ]
    rest = FusedAdamW(params)
    rest.load_state_dict(half.state_dict())
    for step in (2, 3):
        set_grads(params, step)
        rest.step()
    assert all(map(torch.equal, tensors(whole), tensors(rest))), "other bits than without the stop"


def default_device() -> None:
    torch.set_default_device("cuda")
    try:
        trained(GPU)
    finally:
        torch.set_default_device(None)


def other_thread() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            same_bits()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def swapped() -> None:
    """Averages are in the parameters for a while, and every bit comes back."""
    optimizer = trained(GPU, torch.bfloat16, precision="split32", ema_decay=0.9)
    before = tensors(optimizer)
    with optimizer.swap_ema():
        for param in optimizer.param_groups[0]["params"]:
            assert torch.equal(param, optimizer.state[param]["ema"].bfloat16())
    assert all(map(torch.equal, tensors(optimizer), before))


RECIPES = ("master32", "split32", "split32-bf16", "split24-bf16", "sr-bf16", "split24-int8")
PROMISES: dict[str, Callable[[], object]] = {
    "float32": same_bits,
    "bfloat16": lambda: same_bits(torch.bfloat16),
    "float16": lambda: same_bits(torch.float16),
    **{
        recipe: functools.partial(same_bits, torch.bfloat16, precision=recipe) for recipe in RECIPES
    },
    "native-int8": lambda: same_bits(precision="native-int8"),
    "amsgrad": lambda: same_bits(amsgrad=True),
    "ema_decay": lambda: same_bits(torch.bfloat16, precision="split32-bf16", ema_decay=0.9),
    "swap_ema": swapped,
    "skip_nonfinite": lambda: same_bits(skip_nonfinite=True),
    "max_grad_norm": lambda: same_bits(max_grad_norm=1.0),
    "flatten": lambda: same_bits(flatten=True),
    "no wait": nothing_waits,
    "graph": lambda: captured(False),
    "graph, flatten": lambda: captured(True),
    "step in backward": in_backward,
    "GradScaler": scaler,
    "offload": offloaded,
    "state on the host": streamed,
    "checkpoint": resumed,
    "default device": default_device,
    "another thread": other_thread,
}


def main(names: Sequence[str]) -> int:
    """Exit code: 1 if a promise does not hold, 2 if there is no GPU."""
    warnings.simplefilter("ignore")
    for name in names:
        if name not in PROMISES:
            print(f"{name!r} is not known; allowed: {', '.join(PROMISES)}")
            return 2
    if not torch.cuda.is_available():
        print("there is no GPU here")
        return 2
    wanted = names or list(PROMISES)
    held = 0
    for name in wanted:
        begin = time.monotonic()
        try:
            PROMISES[name]()
            torch.cuda.synchronize()
        except Exception as error:
            print(
                f"FAILED {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
                flush=True,
            )
            traceback.print_exc(limit=-3)
            if any(words in str(error) for words in FATAL):
                print("FAILED the rest: this process can no longer use the GPU")
                break
        else:
            held += 1
            print(f"ok {name} ({time.monotonic() - begin:.1f} s)", flush=True)
    print(f"{held} of {len(wanted)} promises hold")
    return 0 if held == len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
