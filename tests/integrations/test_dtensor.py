"""DTensor parameters over 1, 2 and 4 gloo processes: the bits of one process, norms over all
shards, errors on all.
"""

import copy
import pickle
import types
import weakref

import hashes
import pytest
import torch
from ranks import run_ranks
from shards import cut, whole, whole_results
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from training import gradient, results, same_bits, values

from bench import verify
from fused_adam import FusedAdamW
from fused_adam.state import offload

STEPS = 4
# Uneven shards, empty ones (of 3, 2 or 1 rows), nothing at all, rows that are no whole vectors or
# fours.
SHAPES = [(33, 6), (33,), (3, 33), (3,), (2, 5, 4), (1,), (0, 4), (17, 7), (16, 64)]
OPTIONS = [
    (torch.float32, {}),
    (torch.float32, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
    (torch.float64, {"max_grad_norm": 0.5}),
    (torch.float32, {"precision": "native-bf16", "seed": 7, "max_grad_norm": 0.5}),
    (torch.float16, {"precision": "master32", "skip_nonfinite": True}),
    (torch.bfloat16, {"precision": "split32"}),
    (torch.bfloat16, {"precision": "split24-bf16", "amsgrad": True}),
    (torch.bfloat16, {"precision": "sr-bf16", "seed": 2**40 + 1}),
]
FEW_SHAPES = [(33, 6), (3,), (17, 7)]
# 8-bit groups are those of one process where every shard is whole groups.
WHOLE_GROUPS = [(16, 64), (128,), (4, 8, 4), (32, 32)]


def train(optimizer, steps=STEPS, first=0):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(first, first + steps):
        for index, param in enumerate(params):
            grad = gradient(param, index, step)
            param.grad = (
                cut(grad, param.device_mesh, param.placements)
                if isinstance(param, DTensor)
                else grad
            )
        optimizer.step()


def parameters(dtype, shapes, mesh=None, placements=()):
    """Parameters sharded as `placements` say, each or all; plain ones without a mesh."""
    whole_ones = [values(shape, i, dtype) for i, shape in enumerate(shapes)]
    if mesh is None:
        return [torch.nn.Parameter(value) for value in whole_ones]
    if not isinstance(placements, list):
        placements = [placements] * len(shapes)
    return [
        torch.nn.Parameter(value if place is None else cut(value, mesh, place))
        for value, place in zip(whole_ones, placements, strict=True)
    ]


def alone(dtype, options, shapes=SHAPES):
    optimizer = FusedAdamW(parameters(dtype, shapes), lr=1e-2, **options)
    train(optimizer)
    return optimizer


def in_rows(rank, world, dtype, options, shapes):
    mesh = init_device_mesh("cpu", (world,))
    optimizer = FusedAdamW(parameters(dtype, shapes, mesh, (Shard(0),)), lr=1e-2, **options)
    train(optimizer)
    return whole_results(optimizer), optimizer.grad_norm


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=str)
def test_shards_have_the_bits_of_one_process(dtype, options, world):
    ranks = run_ranks(world, in_rows, world, dtype, options, SHAPES)
    expected = alone(dtype, options)
    for found, grad_norm in ranks:
        assert same_bits(found, results(expected))
        if expected.grad_norm is not None:  # in another order
            torch.testing.assert_close(grad_norm, expected.grad_norm, rtol=2e-7, atol=0)


@pytest.mark.parametrize("precision", ["sr-bf16", "split24-int8"])
def test_the_kernel_on_shards(precision):
    """In the interpreter; some shards do not begin at a multiple of 4 elements, as draws of random
    bits do.
    """
    shapes = FEW_SHAPES if precision == "sr-bf16" else WHOLE_GROUPS
    options = {"precision": precision, "seed": 3, "max_grad_norm": 0.5}
    ranks = run_ranks(2, in_rows, 2, torch.bfloat16, {**options, "backend": "triton"}, shapes)
    expected = results(alone(torch.bfloat16, options, shapes))
    assert all(same_bits(found, expected) for found, _ in ranks)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"precision": "native-int8"}),
        (torch.bfloat16, {"precision": "split24-int8", "amsgrad": True}),
    ],
    ids=str,
)
def test_8_bit_states_have_them_where_shards_are_whole_groups(dtype, options, world):
    ranks = run_ranks(world, in_rows, world, dtype, options, WHOLE_GROUPS)
    expected = results(alone(dtype, options, WHOLE_GROUPS))
    assert all(same_bits(found, expected) for found, _ in ranks)


def test_8_bit_states_have_them_where_one_process_holds_all():
    options = {"precision": "split24-int8"}
    [(found, _)] = run_ranks(1, in_rows, 1, torch.bfloat16, options, SHAPES)
    assert same_bits(found, results(alone(torch.bfloat16, options)))


def hashed(rank, world, steps, arguments):
    """The training of bench/verify.py over parameters that are cut."""
    only = arguments.pop("only", None)
    mesh = init_device_mesh("cpu", (world,))
    plain = verify.start("cpu", only)
    params = {
        name: torch.nn.Parameter(cut(param.detach(), mesh, (Shard(0),)))
        for name, param in plain.items()
    }
    optimizer = hashes.optimizer_of(params, **arguments)
    for step in range(steps):
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * (1 - step / 2000)
        for seed, param in enumerate(params.values()):
            wave = verify.noise(param.numel(), 100 + seed + 1000 * step).float()
            grad = (0.5 * whole(param).float() + wave).to(param.dtype)
            param.grad = cut(grad, mesh, (Shard(0),))
        optimizer.step()

    read = {name: torch.nn.Parameter(whole(param)) for name, param in params.items()}
    state = {
        read[name]: {key: whole(x) for key, x in optimizer.state[params[name]].items()}
        for name in params
    }
    return verify.digest(read, types.SimpleNamespace(state=state))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("precision", [None, "split32", "sr-bf16", "native-bf16"])
def test_the_hash_does_not_depend_on_the_world_size(precision, world):
    if precision is None:
        steps, arguments, expected = verify.SHORT_STEPS, {}, verify.SHORT_HASH
    else:
        steps, arguments = hashes.RECIPE_STEPS, hashes.of_recipe(precision)
        expected = hashes.RECIPE_HASHES[precision]
    assert run_ranks(world, hashed, world, steps, arguments) == [expected] * world


# On a mesh of 2 x 2: copies, rows, columns, both, rows within rows; and parameters that are no
# DTensors.
SQUARE = [(8, 6), (8, 6), (8, 6), (8, 6), (8, 6), (8, 6), (8, 6), (7, 5)]
PLACES = [
    (Replicate(), Replicate()),
    (Replicate(), Shard(0)),
    (Shard(1), Replicate()),
    (Shard(0), Shard(1)),
    (Shard(0), Shard(0)),
    None,
    (Shard(1), Shard(1)),
    (Shard(0), Shard(0)),
]


def square(rank, options):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    params = parameters(torch.float32, SQUARE, mesh, PLACES)
    # Of a mesh within the mesh: every row of processes has a copy.
    params += [
        torch.nn.Parameter(cut(values((6, 3), 99, torch.float32), mesh["inner"], (Shard(0),)))
    ]
    optimizer = FusedAdamW(
        [{"params": params[:4]}, {"params": params[4:], "lr": 1e-3}], lr=1e-2, **options
    )
    train(optimizer)
    return whole_results(optimizer), optimizer.grad_norm


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"skip_nonfinite": True}], ids=str)
def test_any_placement_on_several_meshes_beside_plain_parameters(options):
    ranks = run_ranks(4, square, options)
    params = [
        *parameters(torch.float32, SQUARE),
        torch.nn.Parameter(values((6, 3), 99, torch.float32)),
    ]
    expected = FusedAdamW(
        [{"params": params[:4]}, {"params": params[4:], "lr": 1e-3}], lr=1e-2, **options
    )
    train(expected)
    for found, grad_norm in ranks:
        assert same_bits(found, results(expected))
        if options:  # copies are counted once
            torch.testing.assert_close(grad_norm, expected.grad_norm, rtol=2e-7, atol=0)


def columns_with_random_bits(rank):
    """Columns draw bits of their own: no two shards the same, copies all the same."""
    mesh = init_device_mesh("cpu", (2, 2))
    value = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    params = [
        torch.nn.Parameter(cut(value, mesh, place))
        for place in [(Replicate(), Shard(1)), (Shard(1), Shard(0))]
    ]
    optimizer = FusedAdamW(params, lr=1e-3, weight_decay=0.0, precision="sr-bf16")
    for param in params:
        param.grad = cut(torch.ones_like(value), mesh, param.placements)
    optimizer.step()
    return [param.to_local().detach().clone() for param in params]


def test_random_bits_of_columns():
    ranks = run_ranks(4, columns_with_random_bits)
    left, right = ranks[0][0], ranks[1][0]
    assert 0 < (left != 1.0).float().mean() < 1 and not torch.equal(left, right)
    assert torch.equal(left, ranks[2][0]) and torch.equal(right, ranks[3][0])
    blocks = [rank[1] for rank in ranks]
    assert all(not torch.equal(blocks[i], blocks[j]) for i in range(4) for j in range(i))


def layout(rank):
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.bfloat16, [(5, 8), (3,)], mesh, (Shard(0),))
    optimizer = FusedAdamW(params, lr=0.1, precision="split24-int8", amsgrad=True)
    train(optimizer, 1)
    for param in params:
        entry = optimizer.state[param]
        assert type(entry["step"]) is torch.Tensor
        for key in ("exp_avg_ratio", "exp_avg_sq_lattice", "remainder", "max_exp_avg_sq"):
            assert isinstance(entry[key], DTensor) and entry[key].shape == param.shape
            assert (
                entry[key].placements == param.placements
                and entry[key].device_mesh == param.device_mesh
            )
            assert entry[key].stride() == param.stride()
        assert isinstance(entry["exp_avg_ratio_scale"], DTensor)
    before = params[0].to_local().detach().clone()
    codes = optimizer.state[params[0]]["exp_avg_ratio"]
    codes.to_local().fill_(100)  # what users see is what the step reads
    optimizer.state[params[0]]["exp_avg_ratio_scale"].to_local().fill_(1.0)
    train(optimizer, 1)
    moved = (params[0].to_local().detach() - before).abs().max()
    return moved.item(), int(codes.to_local().flatten()[0])


def test_state_is_dtensors_over_the_memory_that_steps_use():
    for moved, code in run_ranks(2, layout):
        assert moved > 0.01 and code not in (0, 100)


def copied(rank, how):
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.bfloat16, SHAPES, mesh, (Shard(0),))
    optimizer = FusedAdamW(params, lr=1e-2, precision="split32-bf16")
    train(optimizer, 2)
    model = torch.nn.ParameterList(params)
    if how == "deepcopy":
        _, other = copy.deepcopy((model, optimizer))
    else:
        _, other = pickle.loads(pickle.dumps((model, optimizer)))
    train(other, 2, first=2)
    train(optimizer, 2, first=2)
    return whole_results(optimizer), whole_results(other)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_continue_alike(how):
    for mine, its in run_ranks(2, copied, how):
        assert same_bits(mine, its)


def offloaded(rank, options):
    """As on a GPU: here there is no other memory, so one place of it stands for the host's."""
    offload.host_memory = lambda tensor: torch.empty_like(tensor)
    mesh = init_device_mesh("cpu", (2,))
    optimizer = FusedAdamW(
        parameters(torch.bfloat16, SHAPES, mesh, (Shard(0),)), lr=1e-2, **options
    )
    train(optimizer, 2)
    before = whole_results(optimizer)
    optimizer.offload()
    meanwhile = whole_results(optimizer)
    optimizer.reload()
    train(optimizer, 2, first=2)
    return before, meanwhile, whole_results(optimizer)


@pytest.mark.parametrize("precision", ["split32-bf16", "split24-int8"])
def test_state_goes_to_the_host_and_back(precision):
    everyone = run_ranks(2, offloaded, {"precision": precision})
    [trained, _] = run_ranks(2, in_rows, 2, torch.bfloat16, {"precision": precision}, SHAPES)
    for before, meanwhile, after in everyone:
        assert same_bits(before, meanwhile) and same_bits(after, trained[0])


def copied_entry_by_entry(entry):
    """As verl, NeMo-RL and prime-rl move state: `.to("cpu")` makes another tensor on a GPU."""
    for key, value in entry.items():
        if isinstance(value, torch.Tensor):
            entry[key] = value.to("cpu", copy=True)


def copied_in_a_new_entry(entry):
    """Moments alone, all at once: the step counter stays."""
    entry.update({key: value.clone() for key, value in entry.items() if key != "step"})


def copied_within(entry):
    """The DTensor stays, over other memory."""
    for value in entry.values():
        if isinstance(value, DTensor):
            value._local_tensor = value._local_tensor.clone()


def moved_by_loops(rank, options, move):
    """State goes away and comes back after every step, and at first is made by `init_state()`."""
    mesh = init_device_mesh("cpu", (2,))
    optimizer = FusedAdamW(
        parameters(torch.bfloat16, FEW_SHAPES, mesh, (Shard(0),)), lr=1e-2, **options
    )
    optimizer.init_state()
    freed = []
    for step in range(STEPS):
        for _ in ("there", "back"):
            param_states = optimizer._engine.arena.param_states.values()
            memory = [
                weakref.ref(slot.segment) for home in param_states for slot in home.slots.values()
            ]
            for entry in optimizer.state.values():
                move(entry)
            freed.append(all(ref() is None for ref in memory))
        train(optimizer, 1, first=step)
    return (
        whole_results(optimizer),
        freed,
        [type(value) for value in optimizer.state[optimizer._params()[0]].values()],
    )


@pytest.mark.parametrize(
    ("precision", "backend"), [("split32-bf16", "reference"), ("split24-int8", "triton")]
)
@pytest.mark.parametrize("move", [copied_entry_by_entry, copied_in_a_new_entry, copied_within])
def test_state_that_a_loop_moves(move, precision, backend):
    """What kernels step is free at once, and the bits are those of a training without the loop."""
    everyone = run_ranks(2, moved_by_loops, {"precision": precision, "backend": backend}, move)
    [trained, _] = run_ranks(2, in_rows, 2, torch.bfloat16, {"precision": precision}, FEW_SHAPES)
    for found, freed, types_of_entries in everyone:
        assert same_bits(found, trained[0])
        assert all(freed) or move is copied_within or backend == "reference"
        assert types_of_entries[0] is torch.Tensor and {*types_of_entries[1:]} == {DTensor}


def partial_gradient(rank):
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.float32, [(4, 3), (5,)], mesh, [(Replicate(),), (Shard(0),)])
    optimizer = FusedAdamW(params, lr=1e-2)
    for step in range(3):
        for index, param in enumerate(params):
            half = gradient(param, index, step) / 2
            param.grad = DTensor.from_local(half, mesh, [Partial()])
        before = params[0].grad
        optimizer.step()
        assert params[0].grad is before and before.placements[0].is_partial()
        assert not optimizer._engine.redistributed  # the sums are let go
    return whole_results(optimizer)


def test_gradients_that_are_still_to_be_summed_are():
    params = parameters(torch.float32, [(4, 3), (5,)])
    expected = FusedAdamW(params, lr=1e-2)
    train(expected, 3)
    assert all(same_bits(found, results(expected)) for found in run_ranks(2, partial_gradient))


def poisoned(rank, value, options):
    mesh = init_device_mesh("cpu", (4,))
    params = parameters(
        torch.float32, [(3, 4), (2,)], mesh, (Shard(0),)
    )  # the last rank has nothing
    optimizer = FusedAdamW(params, lr=1e-2, **options)
    train(optimizer, 1)
    before = whole_results(optimizer)
    for index, param in enumerate(params):
        grad = gradient(param, index, 1)
        grad.view(-1)[-1] = value
        param.grad = cut(grad, mesh, param.placements)
    optimizer.step()
    return (
        before,
        whole_results(optimizer),
        int(optimizer.skipped_steps),
        float(optimizer.grad_norm),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_one_bad_gradient_skips_the_step_on_every_rank(options, value):
    for before, after, skipped, norm in run_ranks(
        4, poisoned, value, {"skip_nonfinite": True, **options}
    ):
        assert same_bits(before, after) and skipped == 1 and not norm < float("inf")


def with_reduce_norm(rank):
    """Two optimizers, as of two stages of a pipeline, on meshes of two ranks each; the norm is of
    all four.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    stage = mesh.get_local_rank("stage")
    shapes = SHAPES[:3] if stage == 0 else SHAPES[3:5]
    params = parameters(torch.float32, shapes, mesh["data"], (Shard(0),))
    optimizer = FusedAdamW(params, lr=1e-2, max_grad_norm=0.1)

    def over_stages(total):
        distributed.all_reduce(total, group=mesh.get_group("stage"))
        return total

    optimizer.reduce_norm = over_stages
    assert optimizer.reduce_norm is over_stages
    train(optimizer, 1)
    return float(optimizer.grad_norm)


def test_reduce_norm_adds_what_no_mesh_shows():
    norms = run_ranks(4, with_reduce_norm)
    squares = [
        float(gradient(param, index, 0).double().square().sum())
        for shapes in (SHAPES[:3], SHAPES[3:5])
        for index, param in enumerate(parameters(torch.float32, shapes))
    ]
    assert norms == pytest.approx([sum(squares) ** 0.5] * 4, rel=1e-7)


# --- What cannot be stepped stops every rank


def differing(rank, what):
    mesh = init_device_mesh("cpu", (2,))
    dtype = torch.bfloat16 if what == "dtype" and rank else torch.float32
    shapes = [(4, 8), (4, 8)]
    params = parameters(dtype, shapes, mesh, (Shard(0),))
    options = {}
    if what == "precision":
        options["precision"] = "native-bf16" if rank else "native-int8"
    if what == "max_grad_norm":
        options["max_grad_norm"] = 1.0 + rank
    groups = [{"params": params}]
    if what == "group" and rank:
        groups = [{"params": params[:1]}, {"params": params[1:]}]
    if what == "parameters" and rank:
        groups = [{"params": params[:1]}]
    optimizer = FusedAdamW(groups, **options)
    for param in params:
        param.grad = cut(torch.ones(param.shape, dtype=dtype), mesh, param.placements)
    if what == "gradient" and rank:
        params[1].grad = None
    if what == "failure" and rank:
        moments = {key: torch.zeros_like(params[0]) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[params[0]] = {"step": torch.tensor(-1.0), **moments}
    before = [param.to_local().clone() for param in params]
    for _ in range(2):  # and once more
        with pytest.raises((RuntimeError, ValueError)) as error:
            optimizer.step()
    assert all(
        torch.equal(param.to_local(), value) for param, value in zip(params, before, strict=True)
    )
    return str(error.value)


@pytest.mark.parametrize(
    "what", ["dtype", "group", "parameters", "precision", "max_grad_norm", "gradient"]
)
def test_ranks_that_differ_all_say_so(what):
    first, second = run_ranks(2, differing, what)
    assert first == second and "ranks differ" in first and what in first and "rank 1" in first


def test_what_stops_one_rank_stops_all():
    first, second = run_ranks(2, differing, "failure")
    assert (
        "'step' of parameter 0" in second
        and "no rank steps, because rank 1" in first
        and second in first
    )


def refused(rank):
    mesh = init_device_mesh("cpu", (2,))
    two_by_one = init_device_mesh("cpu", (2, 1))
    param = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    texts = []
    with pytest.raises(ValueError) as error:
        FusedAdamW([torch.nn.Parameter(param)])
    texts.append(str(error.value))
    sharded = parameters(torch.float32, [(4, 3)], mesh, (Shard(0),))
    optimizer = FusedAdamW(sharded)
    train(optimizer, 1)
    before = whole_results(optimizer)
    saved = optimizer.state_dict()
    for key, value in {
        "exp_avg": cut(torch.ones(4, 3), two_by_one, [Shard(0), Replicate()]),
        "exp_avg_sq": cut(torch.ones(5, 3), mesh, [Shard(0)]),
    }.items():
        wrong = copy.copy(saved)
        wrong["state"] = {0: {**saved["state"][0], key: value}}
        with pytest.raises(ValueError) as error:
            optimizer.load_state_dict(wrong)
        texts.append(str(error.value))
    with pytest.raises(ValueError) as error:
        optimizer.reduce_norm = sum
    texts.append(str(error.value))
    assert same_bits(before, whole_results(optimizer))
    return texts


def test_errors_name_what_is_wrong():
    for texts in run_ranks(2, refused):
        for text, words in zip(
            texts,
            ["Partial", "'exp_avg' lies on", "'exp_avg_sq' has shape", "max_grad_norm"],
            strict=True,
        ):
            assert words in text


def scaled(rank, overflow, options):
    mesh = init_device_mesh("cpu", (2,))
    params = parameters(torch.float32, [(5, 3), (3,)], mesh, (Shard(0),))
    optimizer = FusedAdamW(params, lr=1e-2, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    for index, param in enumerate(params):
        grad = gradient(param, index, 0) * 1024.0
        if overflow:
            grad.view(-1)[-1] = float("inf")
        param.grad = cut(grad, mesh, param.placements)
    scaler.step(optimizer)
    scaler.update()
    return whole_results(optimizer), scaler.get_scale()


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"max_grad_norm": 0.5}], ids=str)
def test_a_grad_scaler_across_ranks(options, overflow):
    params = parameters(torch.float32, [(5, 3), (3,)])
    expected = FusedAdamW(params, lr=1e-2, **options)
    if not overflow:
        train(expected, 1)
    for found, scale in run_ranks(2, scaled, overflow, options):
        assert scale == (512.0 if overflow else 1024.0)
        if overflow:
            found = [{"param": entry["param"]} for entry in found]
        assert same_bits(found, results(expected))
