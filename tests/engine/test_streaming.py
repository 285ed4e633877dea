"""State on the host: the bits of state on the device, whatever the streams do first, and the order
of copies and launches.

A CPU stands in for the device, and `streams.py` for its streams.
"""

import pytest
import torch
from recipes import dtype_of, every_recipe
from streams import simulate
from torch import nn
from training import parameters, results, same_bits, train, values

from fused_adam import FusedAdamW, step_in_backward
from fused_adam.backends.streaming import BUFFERS, COMPUTE, IN, OUT

# Around a group and around a piece; larger than a buffer; empty and 0-dim.
SHAPES = [(), (33,), (0, 3), (1024,), (1025,), (31, 100), (5,)]
BUFFER = 20_000  # holds 2,048 elements of two fp32 moments: the model takes four pieces


@pytest.fixture
def streams(monkeypatch):
    return simulate(monkeypatch)


def pair(dtype=torch.float32, shapes=SHAPES, stream_bytes=BUFFER, **options):
    """An optimizer with its state on the host, and one with all of it on the device."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "backend": "triton", **options}
    return (
        FusedAdamW(
            parameters(dtype, shapes), state_device="cpu", stream_bytes=stream_bytes, **options
        ),
        FusedAdamW(parameters(dtype, shapes), **options),
    )


def check_equal(streamed, resident, steps):
    train(streamed, steps)
    train(resident, steps)
    assert same_bits(results(streamed), results(resident))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "amsgrad": True}], ids=str)
def test_fifty_steps_have_the_bits_of_state_on_the_device(streams, options):
    check_equal(*pair(**options), 50)


@every_recipe
def test_every_recipe_has_the_bits_of_state_on_the_device(streams, precision):
    check_equal(*pair(dtype_of(precision), precision=precision, stream_bytes=9000), 5)
