"""Parameters that are listed twice, or that overlap in memory."""

import pytest
import torch
from next_to_torch import BACKENDS
from torch import nn
from training import gradient, parameters, train, values

from fused_adam import FusedAdam


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
