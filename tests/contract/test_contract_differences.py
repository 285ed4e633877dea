"""What is deliberately different from torch's contract, as docs/differences.md has it."""

import pytest
import torch
from actions import outcome, p, snapshot, stepped

from fused_adam import FusedAdam


class TestDifferences:
    """Each has its line in docs/differences.md."""

    def test_a8_capturable_steps_on_a_cpu(self):
        assert outcome(stepped(p(2), capturable=True), FusedAdam) == outcome(
            stepped(p(2)), FusedAdam
        )
        assert "AssertionError" in outcome(stepped(p(2), capturable=True), torch.optim.Adam)

    def test_b8_amsgrad_turned_on_starts_from_zero(self):
        def turn_on(cls):
            optimizer = cls([p(2)])
            optimizer.step()
            optimizer.param_groups[0]["amsgrad"] = True
            optimizer.step()
            return snapshot(optimizer)

        assert "KeyError" in outcome(turn_on, torch.optim.Adam)
        [(_, state)] = turn_on(FusedAdam)
        assert state["max_exp_avg_sq"] == state["exp_avg_sq"]

    def test_c1_foreach_and_fused_choose_no_code_path(self):
        runs = [
            outcome(stepped(p(5), steps=3, **{key: True}), FusedAdam)
            for key in ("foreach", "fused", "amsgrad")
        ]
        assert runs[0] == runs[1] != runs[2]

    def test_c6_there_is_no_functional_form(self):
        import fused_adam

        assert fused_adam.__all__ == [
            "FusedAdam",
            "FusedAdamW",
            "__version__",
            "param_groups",
            "step_in_backward",
        ]

    def test_c2_fused_takes_complex_parameters(self):
        complex_ = p(2, dtype=torch.complex64)
        theirs = outcome(stepped(complex_, fused=True), torch.optim.Adam)
        assert "requires all the params to be floating point" in theirs
        assert outcome(stepped(complex_, fused=True), FusedAdam) == outcome(
            stepped(complex_), FusedAdam
        )

    def test_d4_step_is_float32_whatever_the_default_dtype(self):
        torch.set_default_dtype(torch.float64)
        try:
            ours, theirs = FusedAdam([p(2)]), torch.optim.Adam([p(2)])
            for optimizer in (ours, theirs):
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        [mine], [other] = ours.state.values(), theirs.state.values()
        assert mine["step"].dtype == torch.float32 and other["step"].dtype == torch.float64
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())

    def test_e3_e4_gradients_of_another_dtype(self):
        param = p(3, grad=False)
        param.grad_dtype = torch.bfloat16
        param.grad = torch.ones(3, dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match="dtype"):
            torch.optim.Adam([param]).step()
        FusedAdam([param], lr=0.5).step()
        torch.testing.assert_close(param.detach(), torch.full((3,), 0.5))

    def test_e5_fused_on_cpu_corrupts_strided_parameters_in_torch_only(self):
        def run(cls):
            buffer = torch.zeros(4, 6)
            param = buffer[:, ::2].requires_grad_()
            param.grad = torch.ones(4, 3)
            cls([param], lr=0.5, fused=True).step()
            return buffer.detach()

        assert (run(FusedAdam)[:, 1::2] == 0).all() and torch.allclose(
            run(FusedAdam)[:, ::2], torch.tensor(-0.5)
        )
        assert (run(torch.optim.Adam)[:, 1::2] != 0).any()

    def test_i3_loading_never_aliases(self):
        for cls, aliased in ((FusedAdam, False), (torch.optim.Adam, True)):
            source, target = cls([p(2)]), cls([p(2)])
            source.step()
            saved = source.state_dict()
            target.load_state_dict(saved)
            [entry] = target.state.values()
            assert (
                entry["exp_avg"].data_ptr() == saved["state"][0]["exp_avg"].data_ptr()
            ) == aliased

    def test_i2_shapes_are_checked_on_load(self):
        source, target = FusedAdam([p(2)]), FusedAdam([p(3)])
        source.step()
        with pytest.raises(ValueError, match=r"shape \(2,\).*shape \(3,\)"):
            target.load_state_dict(source.state_dict())
        torch.optim.Adam([p(3)]).load_state_dict(source.state_dict())
