"""Inputs on which other optimizers went wrong, each with the public thread: what no other test here
has.

What others have (`test_the_list_is_right` checks that they exist):

- more than 2^31 elements, int32 sizes (apex#1654, DeepSpeed#7640, pytorch#101449):
  numerics/test_large.py::test_chunks_far_behind_the_first_element,
  numerics/test_codegen.py::test_every_offset_to_an_element_is_64_bits_wide
- strided, expanded, transposed, channels_last (pytorch#110758, #106951):
  numerics/test_kernel.py::test_any_layout_of_parameter_and_gradient,
  numerics/test_recipe_bits.py::test_channels_last_on_both_backends
- misaligned views: numerics/test_kernel.py::test_nothing_around_the_buffers_is_touched
- one step counter for all parameters (TransformerEngine#1986):
  contract/test_optimizer.py::test_frozen_and_unfrozen_layers_keep_their_counters
- counters beyond 2^24: numerics/test_kernel.py::test_step_counters_beyond_what_float32_counts
- step tensors shared in a checkpoint that we write:
  state/test_checkpoint.py::test_steps_in_a_checkpoint_are_tensors_of_their_own
- checkpoints that alias the live state (pytorch#196083, #147288):
  state/test_checkpoint.py::test_loading_does_not_alias_the_checkpoint,
  state/test_checkpoint.py::test_loading_into_a_running_optimizer_keeps_its_memory
- the state's dtype lost on loading (pytorch#43706, torchtitan#4615, Megatron-LM#1359):
  state/test_recipe_checkpoints.py::test_resuming_is_bit_equal_to_not_having_stopped,
  state/test_checkpoint.py::test_moments_are_kept_in_the_parameters_dtype
- bf16 moments or no master weight where better ones were asked for (apex#1728):
  numerics/test_recipe_bits.py::test_what_is_stored_is_what_the_recipe_says
- bf16 weights that stand still, decay that is lost (pytorch#120376):
  numerics/test_recipe_training.py::test_decay_alone_arrives,
  numerics/test_accuracy.py::test_error_no_higher_than_torchs_best
- second moments in 8 bits that go stale:
  numerics/test_recipe_training.py::test_second_moments_do_not_go_stale
- one stream of random bits for all tensors (llm.c#597):
  numerics/test_codec_words.py::test_words_are_keyed_by_element_step_and_ordinal
- clipping before unscaling (apex#1512):
  numerics/test_clip.py::test_under_a_scaler_the_norm_is_of_unscaled_gradients
- an overflow flag of two that does not skip:
  contract/test_amp.py::test_g5_g6_any_found_inf_but_zero_skips
- swapped data, swapped tensors, moved gradients:
  contract/test_outside_changes.py::test_swapped_data_is_noticed,
  contract/test_outside_changes.py::test_swapped_tensors_are_noticed,
  numerics/test_kernel.py::test_gradients_move_between_steps
- another dtype at the same address:
  contract/test_outside_changes.py::test_a_gradient_of_another_dtype_at_the_same_address_is_noticed
- parameters that overlap or are listed twice:
  contract/test_overlaps.py::test_parameters_that_overlap_are_stepped_in_order,
  contract/test_overlaps.py::test_a_parameter_listed_twice_is_stepped_twice
- writes that autograd does not see:
  contract/test_optimizer.py::test_autograd_notices_that_a_step_changed_a_saved_tensor
- a wait per parameter and step (pytorch#128208):
  engine/test_host_cost.py::test_no_step_reads_the_device
- a launch per group (rf-detr#1409):
  numerics/test_kernel.py::test_one_update_launch_for_all_groups_of_a_dtype_mix
"""

import copy
import gc
import weakref

import named
import pytest
import torch
from torch import nn
from training import gradient, parameters, results, same_bits, train, values

from fused_adam import FusedAdam, FusedAdamW

BACKENDS = ["reference", "triton"]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def test_the_list_is_right():
    assert len(named.named(__doc__)) > 20 and named.missing(__doc__) == []


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


# Sizes and groups
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    "shapes", [[(0,)], [(0,), (5,)], [(5,), (0, 3)], [(5,), (0,), (129,), (0,)]], ids=str
)
def test_empty_parameters_anywhere_in_a_group(shapes, flatten, backend):
    """The others step as without them. https://github.com/NVIDIA/TransformerEngine/issues/3207
    (last: all skipped), https://github.com/NVIDIA/TransformerEngine/issues/3202 (writes out of
    bounds)."""
    options = {"backend": backend, "flatten": flatten, "max_grad_norm": 1.0, "amsgrad": True}
    filled = [shape for shape in shapes if 0 not in shape]
    optimizer = FusedAdam(parameters(FP32, shapes), **options)
    assert len(shapes) > len(filled)
    train(optimizer, 2)
    for param in members(optimizer):
        assert (
            optimizer.state[param]["step"] == 2
            and optimizer.state[param]["exp_avg"].shape == param.shape
        )
    if filled:
        numbers = [i for i, shape in enumerate(shapes) if 0 not in shape]
        alone = FusedAdam([nn.Parameter(values(shapes[i], i, FP32)) for i in numbers], **options)
        for step in range(2):
            for i, param in zip(numbers, members(alone), strict=True):
                param.grad = gradient(param, i, step)
            alone.step()
        assert same_bits([r for r in results(optimizer) if r["param"].numel()], results(alone))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_parameter_writes_nothing_where_it_points(backend):
    """Its address is that of somebody's memory:
    https://github.com/NVIDIA/TransformerEngine/issues/3202.
    """
    memory = torch.full((64,), 7.0)
    for start in (0, 5, 64):
        param = memory[start:start].requires_grad_()
        param.grad = torch.ones(64)[start:start]
        FusedAdam([param], backend=backend).step()
    assert (memory == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_without_parameters_or_gradients_hold_nothing_up(backend):
    """Each parameter counts its own steps: https://github.com/NVIDIA/TransformerEngine/issues/1986."""
    late, frozen, busy = parameters(FP32, [(3,), (4,), (5,)])
    optimizer = FusedAdam(
        [{"params": []}, {"params": [frozen]}, {"params": [busy]}], backend=backend
    )
    twin = FusedAdam([busy.detach().clone().requires_grad_()], backend=backend)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [late], "lr": 0.5})
            frozen.grad = torch.ones(4)
        late.grad = torch.ones(3) if step == 3 else None
        busy.grad = members(twin)[0].grad = gradient(busy, 0, step)
        optimizer.step()
        twin.step()
    assert [optimizer.state[p]["step"].item() for p in (late, frozen, busy)] == [1, 2, 4]
    assert same_bits([results(optimizer)[1]], results(twin))


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_gradients_in_a_group_of_mixed_dtypes(backend):
    """Whichever comes first or lacks a gradient:
    https://github.com/deepspeedai/DeepSpeed/issues/8471.
    """
    dtypes = (BF16, FP32, FP16, torch.complex64, FP32)
    missing = [(), (0,), (1, 4), (0, 1, 2, 3), ()]

    def make():
        return [nn.Parameter(values((7,), i, FP32).to(dtype)) for i, dtype in enumerate(dtypes)]

    together, alone = (
        FusedAdam(make(), backend=backend),
        [FusedAdam([p], backend=backend) for p in make()],
    )
    for step, without in enumerate(missing):
        for i, (param, optimizer) in enumerate(zip(members(together), alone, strict=True)):
            grad = None if i in without else values((7,), 100 * step + i, FP32).to(dtypes[i])
            param.grad = members(optimizer)[0].grad = grad
            optimizer.step()
        together.step()
    counts = [sum(i not in without for without in missing) for i in range(len(dtypes))]
    assert [r["step"].item() for r in results(together)] == counts
    assert same_bits(results(together), [results(optimizer)[0] for optimizer in alone])


def test_thousands_of_parameters():
    """One table, whatever their number: https://github.com/NVIDIA/TransformerEngine/pull/3418
    (handles ran out).
    """
    numel = 8193
    whole = nn.Parameter(values((numel,), 0, FP32))
    pieces = [nn.Parameter(x.clone()) for x in whole.detach().split(1)]
    optimizers = FusedAdam([whole]), FusedAdam(pieces)
    for step in range(2):
        whole.grad = gradient(whole, 0, step)
        for piece, grad in zip(pieces, whole.grad.split(1), strict=True):
            piece.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(torch.cat([piece.detach() for piece in pieces]), whole.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_dimensions_of_size_one_say_nothing(backend):
    """As bmm and conv1d leave them: https://github.com/pytorch/pytorch/issues/110758."""
    plain, odd = (nn.Parameter(values((4, 1, 3), 0, FP32)) for _ in range(2))
    plain.grad = values((4, 1, 3), 1, FP32)
    odd.grad = plain.grad.as_strided((4, 1, 3), (3, 99, 1))
    optimizers = [FusedAdam([p], backend=backend) for p in (plain, odd)]
    for optimizer in optimizers:
        optimizer.step()
    assert odd.grad.stride() != plain.grad.stride() and same_bits(*map(results, optimizers))


# Step counters
# ------------------------------------------------------------------------------------------------

COUNTERS = [BF16, FP16, torch.float64, torch.int64, torch.uint8]


@pytest.mark.parametrize(
    ("dtype", "backend"), [*((dtype, "reference") for dtype in COUNTERS), (BF16, "triton")]
)
def test_counters_of_any_dtype_go_on_in_float32(dtype, backend):
    """bf16 stops at 256, uint8 at 255: https://github.com/deepspeedai/DeepSpeed/pull/8496; integers
    were refused: https://github.com/pytorch/pytorch/issues/127197."""
    last = 255 if dtype == torch.uint8 else 256
    source = FusedAdam(parameters(FP32, [(5,), (3,)]))
    train(source, 1)
    checkpoint = copy.deepcopy(source.state_dict())
    loaded, by_hand, expected = (
        FusedAdam(parameters(FP32, [(5,), (3,)]), backend=backend) for _ in range(3)
    )
    for entry in checkpoint["state"].values():
        entry["step"] = torch.tensor(last, dtype=dtype)
    loaded.load_state_dict(checkpoint)
    for entry in checkpoint["state"].values():
        entry["step"] = torch.tensor(float(last))
    for optimizer in (by_hand, expected):
        optimizer.load_state_dict(checkpoint)
    train(by_hand, 0)
    for param in members(by_hand):
        by_hand.state[param]["step"] = torch.tensor(last, dtype=dtype)
    for optimizer in (loaded, by_hand, expected):
        train(optimizer, 3, first=1)
        assert {(r["step"].item(), r["step"].dtype) for r in results(optimizer)} == {
            (last + 3, FP32)
        }
    assert same_bits(results(loaded), results(expected)) and same_bits(
        results(by_hand), results(expected)
    )


def test_one_step_tensor_for_all_entries_of_a_checkpoint_counts_once():
    """As some tools write them; torch advances the shared tensor once per parameter."""
    source = FusedAdam(parameters(FP32, [(5,), (3,), (4,)]))
    train(source, 3)
    checkpoint = copy.deepcopy(source.state_dict())
    shared = torch.tensor(3.0)
    for entry in checkpoint["state"].values():
        entry["step"] = shared
    loaded = FusedAdam([p.detach().clone().requires_grad_() for p in members(source)])
    loaded.load_state_dict(checkpoint)
    for optimizer in (source, loaded):
        train(optimizer, 2, first=3)
    assert shared == 3 and same_bits(results(loaded), results(source))


@pytest.mark.parametrize("running", [False, True])
def test_a_state_dict_from_before_the_first_step(running):
    """https://github.com/pytorch/pytorch/issues/2647: it holds no entries, and the next step is the
    first.
    """
    empty = FusedAdam(parameters(FP32, [(5,), (3,)])).state_dict()
    optimizer, fresh = (FusedAdam(parameters(FP32, [(5,), (3,)])) for _ in range(2))
    if running:
        train(optimizer, 2)
        for param, start in zip(members(optimizer), members(fresh), strict=True):
            param.data.copy_(start)
    optimizer.load_state_dict(empty)
    for each in (optimizer, fresh):
        train(each, 1)
    assert same_bits(results(optimizer), results(fresh))


# Numbers
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("lr", [1e-10, 1e-20, 1e-38, 1e-45, 0.0])
def test_tiny_learning_rates_with_capturable(lr, as_tensor, backend):
    """torch divides by the step size there: https://github.com/pytorch/pytorch/issues/97004
    (overflow), https://github.com/pytorch/pytorch/issues/126514 (zero times zero is NaN)."""
    runs = []
    for capturable in (False, True):
        params = parameters(FP32, [(5,), (3,)])
        optimizer = FusedAdamW(
            params,
            lr=torch.tensor(lr) if as_tensor else lr,
            capturable=capturable,
            backend=backend,
        )
        for step in range(2):
            for i, param in enumerate(params):
                param.grad = gradient(param, i, step) if i or lr else torch.zeros(5)
            optimizer.step()
        assert all(value.isfinite().all() for r in results(optimizer) for value in r.values())
        moved = max(
            (p - q).abs().max() for p, q in zip(params, parameters(FP32, [(5,), (3,)]), strict=True)
        )
        assert moved <= 4 * lr  # and far below an ulp: nothing at all
        runs.append(results(optimizer))
    assert same_bits(*runs)


@pytest.mark.filterwarnings(
    "ignore:.* encountered in:RuntimeWarning"
)  # numpy's, under the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("numel", [1, 7, 19, 33])
def test_amsgrad_keeps_a_nan_wherever_it_is(numel, backend):
    """torch's fused tails lose it: std::max(old, NaN) is old. Whole vectors and ends alike."""
    for place in {0, numel // 2, numel - 1}:
        param = nn.Parameter(torch.ones(numel))
        optimizer = FusedAdam([param], amsgrad=True, backend=backend)
        for bad in (1.0, float("nan"), 1.0):
            param.grad = torch.ones(numel)
            param.grad[place] = bad
            optimizer.step()
        poisoned = torch.arange(numel) == place
        for value in (
            param.detach(),
            *(optimizer.state[param][k] for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
        ):
            assert torch.equal(value.isnan(), poisoned)


# Memory that moves
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flatten", [False, True])
def test_another_order_at_the_same_address(flatten, backend):
    """`param.data = param.data.t()`: address, dtype and shape stay, and every element is another
    one.

    A parameter under flatten=True, too, which lies in our buffer before and after.
    """
    start, grads = values((6, 6), 0, FP32), [values((6, 6), step, FP32) for step in (1, 2)]
    param, plain = nn.Parameter(start.clone()), nn.Parameter(start.t().clone())
    optimizer, twin = FusedAdam([param], backend=backend, flatten=flatten), FusedAdam([plain])
    param.grad, plain.grad = grads[0].clone(), grads[0].t().clone()
    optimizer.step()
    twin.step()
    address = param.data_ptr()
    moments = {k: v.clone() for k, v in optimizer.state[param].items()}
    param.data = param.data.t()
    assert param.data_ptr() == address
    optimizer.zero_grad()
    # Moments stay with row and column, as in torch; the twin's went along with the elements.
    for key in ("exp_avg", "exp_avg_sq"):
        twin.state[plain][key].copy_(moments[key])
    param.grad, plain.grad = (grads[1].clone() for _ in range(2))
    optimizer.step()
    twin.step()
    assert torch.equal(param, plain) and torch.equal(
        optimizer.state[param]["exp_avg"], twin.state[plain]["exp_avg"]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_storage_freed_and_allocated_again(backend):
    """As FSDP1 does around forward: the tensor stays, its memory is elsewhere, and nobody assigned
    `.data`.
    """
    params, others = parameters(FP32, [(500,), (3,)]), parameters(FP32, [(500,), (3,)])
    optimizer, twin = FusedAdam(params, backend=backend), FusedAdam(others)
    kept, addresses = [], set()
    for step in range(4):
        storage = params[0].untyped_storage()
        held, size = params[0].detach().clone(), storage.nbytes()
        storage.resize_(0)
        kept.append(torch.full((500,), 7.0))  # takes the place
        storage.resize_(size)
        params[0].data.copy_(held)
        addresses.add(params[0].data_ptr())
        for each in (optimizer, twin):
            train(each, 1, first=step)
    assert len(addresses) > 1 and all((memory == 7).all() for memory in kept)
    assert same_bits(results(optimizer), results(twin))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_made_anew_over_the_same_memory_starts_anew(backend):
    """State belongs to the parameter, not to its address."""
    params = parameters(FP32, [(5,), (3,)])
    optimizer = FusedAdam(params, backend=backend)
    train(optimizer, 3)
    new = nn.Parameter(params[0].data)
    assert new.data_ptr() == params[0].data_ptr()
    fresh = FusedAdam([new.detach().clone().requires_grad_()], backend=backend)
    del optimizer.state[params[0]]
    optimizer.param_groups[0]["params"][0] = new
    params[0] = None
    for _ in range(2):
        new.grad = members(fresh)[0].grad = gradient(new, 0, 9)
        optimizer.step()
        fresh.step()
    assert (
        same_bits(results(optimizer)[:1], results(fresh))
        and optimizer.state[params[1]]["step"] == 5
    )


@pytest.mark.parametrize(("backend", "flatten"), [("reference", True), ("triton", False)])
def test_optimizers_made_and_dropped_leave_nothing(backend, flatten):
    """The next one finds the same addresses, and no memory, table or counter of the last one. Nor
    do they leak: https://github.com/pytorch/pytorch/issues/188174."""
    runs, dead = [], []
    for _ in range(3):
        params = parameters(FP32, [(5,), (40, 3), (2,)])
        optimizer = FusedAdam(params, backend=backend, flatten=flatten, max_grad_norm=1.0)
        train(optimizer, 2)
        runs.append(results(optimizer))
        dead += [
            weakref.ref(x) for x in (optimizer, *params, optimizer.state[params[0]]["exp_avg"])
        ]
        del params, optimizer
        gc.collect()
        assert all(ref() is None for ref in dead)
    assert all(same_bits(run, runs[0]) for run in runs)
