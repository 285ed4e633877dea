"""Clear errors, before anything changes."""

import pytest
import torch
from torch import nn
from training import results, same_bits, train

from fused_adam import FusedAdam


class TestErrors:
    """Each names the argument, the value and what is allowed; nothing has changed before it."""

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
            ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
            ({"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
            ({"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
            (
                {"fused": True, "foreach": True},
                RuntimeError,
                "`fused` and `foreach` cannot be `True` together",
            ),
            (
                {"backend": "cuda"},
                ValueError,
                "backend='cuda' is not known; allowed: 'auto', 'triton', 'reference'",
            ),
            ({"backend": None}, ValueError, "backend=None is not known"),
            ({"flatten": "yes"}, TypeError, "flatten='yes' must be True or False"),
            ({"learning_rate": 1.0}, TypeError, "learning_rate"),
        ],
    )
    def test_arguments(self, arguments, error, message):
        param = nn.Parameter(torch.ones(3))
        pointer = param.data_ptr()
        with pytest.raises(error, match=message.replace("(", r"\(")):
            FusedAdam([param], **{"flatten": True, **arguments})
        assert param.data_ptr() == pointer and param.grad is None

    def test_no_parameters(self):
        with pytest.raises(ValueError, match="empty parameter list"):
            FusedAdam([])

    def check_nothing_changes(self, bad, grad, error, message):
        good = nn.Parameter(torch.ones(3))
        good.grad = torch.ones(3)
        bad.grad = grad
        optimizer = FusedAdam([good, bad])
        with pytest.raises(error, match=message):
            optimizer.step()
        assert (good == 1).all() and not optimizer.state

    def test_sparse_gradient(self):
        self.check_nothing_changes(
            nn.Parameter(torch.zeros(3)),
            torch.zeros(3).to_sparse(),
            RuntimeError,
            "does not support sparse gradients",
        )

    def test_integer_parameter(self):
        bad = torch.zeros(3, dtype=torch.int64)
        self.check_nothing_changes(
            bad,
            torch.zeros(3, dtype=torch.int64),
            TypeError,
            "parameter 1 .* torch.int64, but must be one of .*bfloat16",
        )

    def test_expanded_parameter(self):
        bad = torch.zeros(1).expand(3).requires_grad_()
        self.check_nothing_changes(bad, torch.zeros(3), RuntimeError, "parameter 1 .* is expanded")

    def test_state_of_the_wrong_shape(self):
        optimizer = FusedAdam([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))])
        train(optimizer, 1)
        before = results(optimizer)[0]
        last = optimizer.param_groups[0]["params"][1]
        optimizer.state[last]["exp_avg"] = torch.zeros(5)
        with pytest.raises(
            ValueError, match=r"state 'exp_avg' of parameter 1 .* shape \(5,\).* shape \(4,\)"
        ):
            train(optimizer, 1)
        assert same_bits([results(optimizer)[0]], [before])

    def test_tensor_subclasses(self):
        from torch.testing._internal.two_tensor import TwoTensor

        with pytest.raises(TypeError, match="TwoTensor, but must be a plain tensor"):
            FusedAdam([nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))])

    def test_meta_parameters_step_once_they_have_values(self):
        module = nn.Linear(2, 2, device="meta")
        optimizer = FusedAdam(module.parameters())
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        with pytest.raises(RuntimeError, match="cannot run on meta"):
            optimizer.step()
        optimizer.zero_grad()
        for p in module.parameters():
            torch.utils.swap_tensors(p, nn.Parameter(torch.ones(p.shape)))
        train(optimizer, 2)
        assert all(r["step"] == 2 for r in results(optimizer))
