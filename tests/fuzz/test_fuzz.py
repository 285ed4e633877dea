"""Whatever is done to an optimizer in whatever order: it stays with its float64 model, and its twin
has the same bits.

The long run draws FUZZ_SEED and prints it, unless it is set, and goes on until FUZZ_STEPS (100 000)
steps are done.
"""

import os
import random
import time

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine with a GPU may lack it

import hypothesis
import hypothesis.strategies as st
from fuzz_machine import Optimizers
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from fused_adam import FusedAdam, engine
from fused_adam import guards as watch
from fused_adam.backends import reference as host
from fused_adam.numerics import codecs
from fused_adam.numerics import formula as reference
from fused_adam.numerics.scalars import GradTransform
from fused_adam.state import checkpoint
from fused_adam.state.staging import StagedCopies

COMMON = settings(
    deadline=None,
    database=None,
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)


def run(machine, lives, **changes):
    run_state_machine_as_test(machine, settings=settings(COMMON, max_examples=lives, **changes))


def test_a_few_lives():
    run(Optimizers, 25, derandomize=True)


@pytest.mark.long
def test_a_hundred_thousand_steps(capsys):
    first = seed = int(os.environ.get("FUZZ_SEED", random.randrange(10**6)))
    wanted = int(os.environ.get("FUZZ_STEPS", 100_000))
    machine = type("Optimizers", (Optimizers,), {"steps_done": 0})
    start = time.time()
    with capsys.disabled():
        print(f"\nFUZZ_SEED={first}", flush=True)
        while machine.steps_done < wanted:
            run(hypothesis.seed(seed)(machine), 100)
            seed += 1
        print(
            f"{machine.steps_done} steps in {seed - first} times 100 lives, "
            f"{time.time() - start:.0f} s",
            flush=True,
        )
    assert machine.steps_done >= wanted


class OnTheKernel(Optimizers):
    """The second runs in Triton's interpreter: a thousand times slower."""

    twins = st.just("triton")
    longest = 2


@pytest.mark.long
@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, in the interpreter: of overflows, inf - inf, x / 0
def test_lives_on_the_kernel():
    run(OnTheKernel, 100, derandomize=True)
    assert OnTheKernel.steps_done >= 300


class Compiled(Optimizers):
    """The second runs through torch.compile, which takes seconds for every mix of dtypes and flags:
    few.
    """

    twins = st.just("compiled")
    precisions, dtypes = st.none(), {None: (torch.float32,)}


@pytest.mark.long
def test_compiled_lives():
    run(Compiled, 100, derandomize=True)
    assert Compiled.steps_done >= 1000


# It can fail: faults that it must find
# ------------------------------------------------------------------------------------------------


def corrected_for_one_step_more(patch):
    scalars = host.scalars
    patch.setattr(host, "scalars", lambda step, *rest: scalars(step + 1, *rest))


def decay_of_frozen_parameters(patch):
    step = FusedAdam.step

    def decayed(self, closure=None):
        step(self, closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.data.mul_(1 - group["weight_decay"])

    patch.setattr(FusedAdam, "step", decayed)


def moments_lost_on_loading(patch):
    settle = checkpoint._settle

    def lossy(arena, state, param, entry, wanted):
        settle(
            arena,
            state,
            param,
            {key: value for key, value in entry.items() if key != "exp_avg_sq"},
            wanted,
        )

    patch.setattr(checkpoint, "_settle", lossy)


def one_element_too_many(patch):
    store_params = StagedCopies.store_params

    def beyond(self):
        store_params(self)
        for p in self.params:
            memory = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage())
            memory[p.storage_offset() + p.numel() :][:1] = 0.5

    patch.setattr(StagedCopies, "store_params", beyond)


def learning_rate_of_the_step_before(patch):
    hyper = engine.hyper

    def stale(group, *rest):
        values = hyper(group, *rest)
        before, group["before"] = group.get("before", values.lr), values.lr
        return values._replace(lr=before)

    patch.setattr(engine, "hyper", stale)


def gradients_scaled_in_place(patch):
    begin = host.ReferenceRunner.begin

    def written(self, grads, *rest):
        for grad in grads:
            if grad.is_contiguous():
                grad.mul_(0.5)
        begin(self, grads, *rest)

    patch.setattr(host.ReferenceRunner, "begin", written)


def poisoned_steps_done(patch):
    read = GradTransform.read
    patch.setattr(GradTransform, "read", lambda self, max_norm, _: read(self, max_norm, 0.0))


def spikes_of_twice_the_limit(patch):
    read = GradTransform.read
    patch.setattr(
        GradTransform, "read", lambda self, max_norm, limit: read(self, max_norm, 2 * limit)
    )


def parameters_that_moved_unnoticed(patch):
    init = watch.PlanGuard.__init__

    def blind(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.addresses = type(
            "Any", (), {"__ne__": lambda self, other: False, "__eq__": lambda self, other: True}
        )()

    patch.setattr(watch.PlanGuard, "__init__", blind)


def second_moments_rounded_eight_codes_up(patch):
    encode_moments = codecs.encode_moments

    def biased(m, v, noise):
        m_code, v_code, *scales = encode_moments(m, v, noise)
        return m_code, (v_code.int() + 8).clamp(max=255).to(torch.uint8), *scales

    patch.setattr(codecs, "encode_moments", biased)


def decay_after_the_update(patch):
    """p * (1 - lr * wd) of the new p: off by lr^2 * wd."""
    update = reference.adam_update

    def late(p, g, m, v, v_max, ema, scalars, flags, *rest):
        undecayed = flags._replace(has_lr_wd=False, cautious=False)
        update(p, g, m, v, v_max, ema, scalars, undecayed, *rest)
        if flags.has_lr_wd and flags.store_param:
            p *= 1 - scalars.lr_wd

    patch.setattr(reference, "adam_update", late)


def cautious_by_the_gradient(patch):
    """Its sign is often that of the first moment, but not always."""
    update = reference.adam_update

    def hasty(p, g, m, v, v_max, ema, scalars, flags, *rest):
        if flags.cautious:
            decays = bool((g * p > 0).any())
            flags = flags._replace(has_lr_wd=decays, cautious=False)
        update(p, g, m, v, v_max, ema, scalars, flags, *rest)

    patch.setattr(reference, "adam_update", hasty)


def averages_of_the_weight_before(patch):
    """An average that is one step late."""
    update = reference.adam_update

    def late(p, g, m, v, v_max, ema, scalars, *rest, **more):
        if ema is not None:
            ema += scalars.one_minus_ema_decay * (p - ema)
        update(p, g, m, v, v_max, None, scalars, *rest, **more)

    patch.setattr(reference, "adam_update", late)


FAULTS = [
    corrected_for_one_step_more,
    decay_of_frozen_parameters,
    moments_lost_on_loading,
    one_element_too_many,
    learning_rate_of_the_step_before,
    gradients_scaled_in_place,
    poisoned_steps_done,
    spikes_of_twice_the_limit,
    parameters_that_moved_unnoticed,
    second_moments_rounded_eight_codes_up,
    decay_after_the_update,
    cautious_by_the_gradient,
    averages_of_the_weight_before,
]


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_found(fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError) as found:
        run(Optimizers, 500, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)
    print(fault.__name__, str(found.value)[:100])
