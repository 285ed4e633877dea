"""The reference's square root: correctly rounded, with numpy and without."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fused_adam.numerics import formula


@pytest.fixture(params=["numpy", "float64"])
def way(request, monkeypatch):
    if request.param == "float64":
        monkeypatch.setattr(formula, "_NUMPY", None)
    else:
        assert formula._NUMPY is not None  # else both would test one way


def test_every_significand_is_correctly_rounded(way):
    """A root rounds alike in every second binade, so two of them are all; float64 is exact enough:
    its 53 bits are more than twice float32's 24, and two.
    """
    x = torch.arange(2**24, dtype=torch.int32).add_(0x3F800000).view(torch.float32)
    assert x[0] == 1 and x[-1] < 4
    assert torch.equal(formula.exact_sqrt(x), x.double().sqrt().float())


def test_special_values_are_as_in_torch(way):
    """Silently: numpy would warn of negative numbers."""
    x = torch.tensor([0.0, -0.0, torch.inf, 1e-45, 1e-39, 3.4e38, torch.nan, -1.0, -torch.inf])
    root = formula.exact_sqrt(x)
    assert root.view(torch.int32)[:6].tolist() == x.sqrt().view(torch.int32)[:6].tolist()
    assert root[6:].isnan().all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (70000,)], ids=str)
def test_other_shapes_types_and_memory(way, shape):
    x = torch.rand(shape)
    for other in (x, x.double(), x.unsqueeze(-1).expand(*shape, 2)):
        root = formula.exact_sqrt(other)
        assert root.dtype == other.dtype and root.shape == other.shape
        torch.testing.assert_close(root, other.sqrt())
    with FakeTensorMode():  # has no memory to share
        assert formula.exact_sqrt(torch.empty(shape)).shape == shape
