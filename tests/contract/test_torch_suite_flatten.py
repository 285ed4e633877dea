"""With flatten=True, parameters have gradients or none as with torch's set_to_none=True.

Gradient views are attached at the first `zero_grad()`. A view that nothing has written since it was
zeroed is no gradient. Each script runs on our optimizer with flatten and on torch's. Both must
agree on which parameters were stepped, how often, and on all values.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from training import gradient, parameters, results, set_grad, values

from bench.harness import oracle
from fused_adam import FusedAdam, FusedAdamW

FP32 = torch.float32
SHAPES = [(5,), (3, 4), (40,), (7,)]
PAIRS = [(FusedAdam, torch.optim.Adam), (FusedAdamW, torch.optim.AdamW)]
both_classes = pytest.mark.parametrize(("ours", "theirs"), PAIRS)


class Run:
    """An optimizer, its parameters, and a clock for the gradients."""

    def __init__(self, cls, params=None, **options):
        self.params = parameters(FP32, SHAPES) if params is None else params
        self.flat = cls in (FusedAdam, FusedAdamW)
        extra = {"flatten": True} if self.flat else {}
        self.optimizer = cls(self.params, lr=1e-2, weight_decay=0.1, **extra, **options)
        self.time = 0

    def backward(self, *places):
        """Gradients for the parameters at these places; for all without any."""
        for place in places or range(len(self.params)):
            set_grad(self.params[place], gradient(self.params[place], place, self.time))

    def step(self):
        self.optimizer.step()
        self.time += 1

    def train(self, *places):
        self.optimizer.zero_grad()
        self.backward(*places)
        self.step()

    def counts(self):
        entries = [self.optimizer.state.get(param, {}) for param in self.params]
        return [int(entry["step"]) if entry else None for entry in entries]


def assert_agree(ours, theirs, script, counts, **options):
    """The script ends with these step counts on both, and with the same values."""
    a, b = Run(ours, **options), Run(theirs, **options)
    for run in (a, b):
        script(run)
        assert run.counts() == counts, type(run.optimizer).__name__
    decoupled = theirs is torch.optim.AdamW
    config = oracle.Options(lr=1e-2, weight_decay=0.1, decoupled=decoupled)
    within = [oracle.tolerance(FP32, b.time, config, roundings) for roundings in (1, 4)]
    for mine, other in zip(results(a.optimizer), results(b.optimizer), strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            atol = sum(tolerance.get(key, 0.0) for tolerance in within)
            torch.testing.assert_close(mine[key], other[key], rtol=0, atol=atol)


@both_classes
def test_views_are_attached_where_there_was_a_gradient(ours, theirs):
    """A parameter that never has one stays as torch leaves it, whatever goes over all gradients."""
    run = Run(ours)
    run.optimizer.zero_grad()
    assert all(param.grad is None for param in run.params)
    run.backward()
    run.optimizer.zero_grad()
    held = [param.grad for param in run.params]
    assert not any(grad.any() for grad in held)
    run.backward()
    run.step()
    run.optimizer.zero_grad()
    assert all(param.grad is grad for param, grad in zip(run.params, held, strict=True))


@both_classes
def test_a_step_before_the_first_zero_grad(ours, theirs):
    def script(run):
        run.step()
        run.backward(0, 2)
        run.step()

    assert_agree(ours, theirs, script, [1, None, 1, None])


@both_classes
def test_gradients_from_before_construction_count(ours, theirs):
    runs = []
    for cls in (ours, theirs):
        params = parameters(FP32, SHAPES)
        for place in (1, 3):
            params[place].grad = gradient(params[place], place, 0)
        runs.append(Run(cls, params))
        runs[-1].step()
        assert runs[-1].counts() == [None, 1, None, 1]
    torch.testing.assert_close(runs[0].params, runs[1].params, rtol=0, atol=1e-6)


@both_classes
def test_experts_that_are_not_chosen_rest(ours, theirs):
    """Neither count, nor decay, nor momentum."""

    def script(run):
        for places in ((0, 1), (0, 2), (0, 1), (2,), (0, 1, 2)):
            run.train(*places)

    assert_agree(ours, theirs, script, [4, 3, 3, None])


@both_classes
def test_a_step_after_zero_grad_alone(ours, theirs):
    def script(run):
        run.train()
        run.optimizer.zero_grad()
        run.step()
        run.optimizer.zero_grad()
        run.optimizer.zero_grad(set_to_none=True)
        run.step()

    assert_agree(ours, theirs, script, [1, 1, 1, 1])


@both_classes
def test_backward_that_writes_zeros_makes_a_gradient(ours, theirs):
    def script(run):
        run.train()
        run.optimizer.zero_grad()
        sum((param * 0).sum() for param in run.params[:2]).backward()
        run.step()

    assert_agree(ours, theirs, script, [2, 2, 1, 1])


@both_classes
def test_what_the_user_writes_is_a_gradient(ours, theirs):
    """Into the tensor that is there, through a reference from before, or as a tensor of its own."""

    def script(run):
        run.train()
        run.optimizer.zero_grad()
        held = run.params[1].grad
        for place, param in enumerate(run.params[:3]):
            grad = gradient(param, place, run.time)
            if place == 1 and run.flat:
                held.copy_(grad)
            else:
                param.grad = grad
        run.step()
        run.train(1, 2)

    assert_agree(ours, theirs, script, [2, 3, 3, 1])


@both_classes
def test_zeros_that_the_user_writes_are_a_gradient(ours, theirs):
    def script(run):
        run.train()
        run.optimizer.zero_grad()
        for param in run.params[:2]:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            else:
                param.grad.zero_()
        run.step()

    assert_agree(ours, theirs, script, [2, 2, 1, 1])


@both_classes
@pytest.mark.parametrize("how", ["data", "numpy", "dlpack"])
def test_what_is_written_past_autograd_is_a_gradient(ours, theirs, how):
    """Through `.data` or an alias of the memory. No version counter tells, as with collectives that
    sum gradients in place: `torch.distributed.all_reduce(param.grad)`."""

    def script(run):
        run.train()
        run.optimizer.zero_grad()
        for place, param in enumerate(run.params):
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            alias = {
                "data": lambda grad: grad.data,
                "numpy": lambda grad: torch.from_numpy(grad.numpy()),
                "dlpack": torch.from_dlpack,
            }[how](param.grad)
            alias.copy_(gradient(param, place, run.time))
        run.step()

    assert_agree(ours, theirs, script, [2, 2, 2, 2])


@both_classes
def test_gradients_that_stay_are_stepped_again(ours, theirs):
    """And those that are missing stay missing."""

    def script(run):
        run.train(0, 1)
        run.step()
        run.backward(1, 2)
        run.step()

    assert_agree(ours, theirs, script, [3, 3, 1, None])


@both_classes
def test_accumulation_over_batches_that_use_other_layers(ours, theirs):
    def script(run):
        for _ in range(2):
            run.optimizer.zero_grad()
            for places in ((0, 1), (1, 2), (0, 2)):
                run.backward(*places)
            run.step()

    assert_agree(ours, theirs, script, [2, 2, 2, None])


@both_classes
def test_a_closure_that_resets_gradients(ours, theirs):
    def script(run):
        def closure():
            run.optimizer.zero_grad()
            loss = sum((param * values(param.shape, 7, FP32)).sum() for param in run.params[1:3])
            loss.backward()
            return loss

        for _ in range(3):
            run.optimizer.step(closure)
            run.time += 1

    assert_agree(ours, theirs, script, [None, 3, 3, None])


@both_classes
def test_clipping_outside_makes_no_gradient(ours, theirs):
    """`clip_grad_norm_` multiplies what is there in place, also what nothing has written."""

    def script(run):
        for clip in (torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_):
            run.optimizer.zero_grad()
            run.backward(0, 1)
            clip(run.params, 0.5)
            run.step()

    assert_agree(ours, theirs, script, [2, 2, None, None])


@both_classes
def test_unscaling_makes_no_gradient(ours, theirs):
    """`GradScaler.unscale_` does so, too."""

    def script(run):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(2):
            run.optimizer.zero_grad()
            loss = sum((param * values(param.shape, 7, FP32)).sum() for param in run.params[1:3])
            scaler.scale(loss).backward()
            scaler.unscale_(run.optimizer)
            scaler.step(run.optimizer)
            scaler.update()
            run.time += 1

    assert_agree(ours, theirs, script, [None, 2, 2, None])


@both_classes
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_between_zero_grad_and_backward(ours, theirs, how):
    def script(run):
        run.train(0, 1, 2)
        run.optimizer.zero_grad()
        if how == "deepcopy":
            run.params, run.optimizer = copy.deepcopy((run.params, run.optimizer))
        else:
            run.params, run.optimizer = pickle.loads(pickle.dumps((run.params, run.optimizer)))
        run.backward(0)
        run.step()
        run.train(1)

    assert_agree(ours, theirs, script, [2, 2, 1, None])


@both_classes
def test_frozen_after_zero_grad(ours, theirs):
    def script(run):
        run.train()
        run.optimizer.zero_grad()
        run.params[0].requires_grad_(False)
        run.backward(1, 2, 3)
        run.step()
        run.train(1, 2, 3)
        run.params[0].requires_grad_(True)
        run.train()

    assert_agree(ours, theirs, script, [2, 4, 4, 4])


@both_classes
def test_a_group_added_later(ours, theirs):
    def script(run):
        run.train(0, 1)
        run.params.append(nn.Parameter(values((6,), 9, FP32)))
        run.optimizer.add_param_group({"params": run.params[-1:]})
        run.train(0, 4)
        run.train(0)

    assert_agree(ours, theirs, script, [3, 1, None, None, 1])


@both_classes
def test_a_parametrization_that_takes_over_the_memory(ours, theirs):
    """`weight_norm` makes a new parameter over the old one's memory. The old one has no gradient
    any more, and must not move what the new one holds."""
    weights = []
    for cls in (ours, theirs):
        layer = nn.Linear(4, 3)
        with torch.no_grad():
            layer.weight.copy_(values((3, 4), 0, FP32))
            layer.bias.copy_(values((3,), 1, FP32))
        run, x = Run(cls, list(layer.parameters())), values((2, 4), 2, FP32)
        for wrapped in (False, True):
            if wrapped:
                torch.nn.utils.parametrizations.weight_norm(layer)
            run.optimizer.zero_grad()
            layer(x).square().mean().backward()
            run.step()
        assert run.counts() == [1, 2]
        weights.append([param.detach() for param in (*run.params, *layer.parameters())])
    # A step moves by 1e-2, rounding (with two backward passes) by a few 1e-7 of values near 2.
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


@both_classes
def test_saving_after_zero_grad(ours, theirs):
    """A checkpoint has no entries for what was never stepped, and loads into torch's and back."""

    def script(run):
        run.train(1, 3)
        run.optimizer.zero_grad()
        saved = copy.deepcopy(run.optimizer.state_dict())
        assert list(saved["state"]) == [1, 3]
        run.optimizer.load_state_dict(saved)
        run.backward(0, 3)
        run.step()

    assert_agree(ours, theirs, script, [1, 1, None, 2])


@both_classes
def test_set_to_none_false_leaves_gradients_of_zeros(ours, theirs):
    """Those that were there: they decay and count. What had none has none."""

    def script(run):
        run.train(0, 1)
        run.optimizer.zero_grad(set_to_none=False)
        run.backward(0)
        run.step()

    assert_agree(ours, theirs, script, [2, 2, None, None])


@both_classes
@pytest.mark.parametrize("kind", ["held", "parts of one buffer", "arrays"])
def test_set_to_none_false_zeroes_gradients_that_others_write_to(ours, theirs, kind):
    """They stay the parameters' gradients, as in torch: what is written to them later counts."""

    def script(run):
        numels = [param.numel() for param in run.params]
        parts = torch.zeros(sum(numels)).split(numels)
        writers = {
            "held": [torch.zeros_like(param) for param in run.params],
            "parts of one buffer": [
                part.view_as(param) for part, param in zip(parts, run.params, strict=True)
            ],
            "arrays": [
                torch.zeros_like(param, requires_grad=False).numpy() for param in run.params
            ],
        }[kind]
        for param, writer in zip(run.params, writers, strict=True):
            grad = torch.as_tensor(writer)  # over the array's memory
            param.grad = grad if kind == "held" else grad.view_as(param)
            del grad
        for _ in range(4):
            run.optimizer.zero_grad(set_to_none=False)
            for place, (param, writer) in enumerate(zip(run.params, writers, strict=True)):
                assert not writer.any()
                torch.as_tensor(writer).add_(gradient(param, place, run.time))
            run.step()

    assert_agree(ours, theirs, script, [4, 4, 4, 4])


@both_classes
def test_parts_of_somebodys_buffer_leave_no_gradient(ours, theirs):
    """As DDP's buckets are: it takes whatever is there after `zero_grad()` for a gradient."""

    def script(run):
        numels = [param.numel() for param in run.params]
        for _ in range(3):
            run.optimizer.zero_grad()
            assert [param.grad for param in run.params] == [None] * 4
            for param, part in zip(run.params, torch.ones(sum(numels)).split(numels), strict=True):
                param.grad = part.view_as(param)
            run.step()
        run.optimizer.zero_grad()
        run.step()

    assert_agree(ours, theirs, script, [3, 3, 3, 3])


@both_classes
def test_the_norm_is_of_gradients_alone(ours, theirs):
    run, other = Run(ours, max_grad_norm=1.0), Run(theirs)
    for each in (run, other):
        each.optimizer.zero_grad()
        each.backward(0, 2)
    norm = torch.nn.utils.clip_grad_norm_(other.params, 1.0)
    run.step()
    torch.testing.assert_close(run.optimizer.grad_norm, norm)
    assert run.counts() == [1, None, 1, None]
