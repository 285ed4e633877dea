"""The backend "compiled": what is compiled, when, and that a failure to compile changes nothing."""

import copy

import pytest
import torch
from training import parameters, results, same_bits, train

from fused_adam import FusedAdamW
from fused_adam.backends import compiled
from fused_adam.numerics.formula import Flags
from fused_adam_kernels import table

SHAPES = [(5,), (40000,), (16385,), (130, 513)]
FLAGS = Flags(has_multiplier=True, has_l2=True, has_lr_wd=True, cautious=True, store_param=True)
NARROW = torch.bfloat16, torch.float32, torch.bfloat16, torch.float16, None, None
DTYPES = {
    "float32": ((torch.float32,) * 4 + (None, None), torch.float32),
    "amsgrad and an average": ((torch.float32,) * 6, torch.float32),
    "narrow": (NARROW, torch.float32),
    "float64": ((torch.float64,) * 5 + (None,), torch.float64),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    compiled.compiled_step.cache_clear()
    yield
    compiled.compiled_step.cache_clear()


@pytest.fixture
def graphs(monkeypatch):
    """Graphs are run as they are. Returns the examples with which they would be compiled."""
    examples = []

    def keep(graph, inputs):
        examples.append(inputs)
        return graph

    monkeypatch.setattr(compiled, "inductor", keep)
    return examples


def optimizer(backend="compiled", shapes=SHAPES):
    return FusedAdamW(parameters(torch.float32, shapes), lr=1e-2, backend=backend)


@pytest.mark.parametrize("mix", DTYPES)
def test_held_code_takes_each_argument_to_its_place(mix, graphs):
    dtypes, compute = DTYPES[mix]
    made = torch.Generator().manual_seed(0)
    operands = [
        None if dtype is None else (torch.rand(96, generator=made) + i).to(dtype)
        for i, dtype in enumerate(dtypes)
    ]
    scalars = torch.rand(table.SCALARS, generator=made).to(compute)
    before, expected = copy.deepcopy(operands), copy.deepcopy(operands)
    compiled._adam_step(*expected, scalars, FLAGS)
    assert not torch.equal(expected[0], before[0])
    compiled.CompiledStep(dtypes, compute, FLAGS)(*operands, scalars)
    for value, expected_value in zip(operands, expected, strict=True):
        assert value is None or torch.equal(value, expected_value)


def test_code_is_compiled_for_all_threads(graphs):
    """Small parameters come first. Inductor wants 512 elements per thread to start any."""
    train(optimizer(shapes=[(40,), (40000,)]), 1)
    [inputs] = graphs
    sizes = {x.numel() for x in inputs if isinstance(x, torch.Tensor) and x.numel() > 12}
    assert min(map(int, sizes)) >= 512 * 256


def test_another_number_of_threads_compiles_anew(graphs):
    before = torch.get_num_threads()
    stepped = optimizer()
    train(stepped, 2)
    assert len(graphs) == 1
    try:
        torch.set_num_threads(before + 1)
        train(stepped, 2, first=2)
    finally:
        torch.set_num_threads(before)
    assert len(graphs) == 2


def test_a_step_in_inference_mode():
    with torch.inference_mode():
        stepped = optimizer()
        train(stepped, 3)
    outside = optimizer()
    train(outside, 3)
    expected = optimizer("reference")
    train(expected, 3)
    assert same_bits(results(stepped), results(expected))
    assert same_bits(results(outside), results(expected))


def test_a_failed_compilation_changes_nothing(monkeypatch):
    def fail(graph, inputs):
        raise OSError("no space left on device")

    stepped, expected = optimizer(), optimizer("reference")
    train(stepped, 2)
    train(expected, 2)
    before = copy.deepcopy(results(stepped))
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "inductor", fail)
        compiled.compiled_step.cache_clear()
        with pytest.raises(Exception, match="no space left"):
            train(stepped, 1, first=2)
    assert same_bits(results(stepped), before)
    train(stepped, 1, first=2)
    train(expected, 1, first=2)
    assert same_bits(results(stepped), results(expected))


def test_the_second_compilation_fails(monkeypatch):
    """Float64 is a launch group of its own: the first group must not have stepped by then."""
    params = [torch.nn.Parameter(torch.ones(40, dtype=t)) for t in (torch.float32, torch.float64)]
    stepped, made = FusedAdamW(params, lr=1e-2, backend="compiled"), []
    stepped.init_state()
    before = copy.deepcopy(results(stepped))

    def fail(graph, inputs):
        made.append(graph)
        if len(made) == 2:
            raise OSError("no space left on device")
        return graph

    monkeypatch.setattr(compiled, "inductor", fail)
    with pytest.raises(Exception, match="no space left"):
        train(stepped, 1)
    assert same_bits(results(stepped), before)
    train(stepped, 1)
    assert [float(stepped.state[p]["step"]) for p in params] == [1, 1]


def test_without_torch_compile_there_is_no_silent_fallback():
    stepped = optimizer()
    stepped.init_state()
    before = copy.deepcopy(results(stepped))
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(RuntimeError, match=r"torch\.compile, which is switched off: allow it"):
            train(stepped, 1)
    assert same_bits(results(stepped), before)
