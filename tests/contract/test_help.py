"""What `help()`, a hover in the editor and `repr()` tell of the two classes."""

import copy
import inspect
import pickle
import re

import pytest
import torch

from fused_adam import FusedAdam, FusedAdamW

CLASSES = pytest.mark.parametrize("cls", [FusedAdam, FusedAdamW])


def explained(cls):
    """Argument -> what the class's own docstring says of it, in its order."""
    section = re.search(r"^ *Args:\n(.*?)^ *Raises:", cls.__dict__["__doc__"], re.S | re.M)[1]
    texts = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w|\Z)", section, re.S | re.M)
    return {name: " ".join(text.split()) for name, text in texts}


@CLASSES
def test_the_docstring_explains_every_argument_in_the_order_of_the_signature(cls):
    assert list(explained(cls)) == list(inspect.signature(cls).parameters)
    assert all(text.endswith(".") for text in explained(cls).values())


@CLASSES
def test_the_docstring_states_the_defaults(cls):
    for name, parameter in inspect.signature(cls).parameters.items():
        text = explained(cls)[name]
        if parameter.default is inspect.Parameter.empty or name in ("foreach", "fused"):
            assert "Default" not in text
            continue
        stated = re.search(r"Default: (\(.*?\)|\"\w+\"|[\w.-]*\w)", text)[1]
        assert eval(stated) == parameter.default


def test_both_classes_say_the_same_of_what_both_have():
    adam, adamw = explained(FusedAdam), explained(FusedAdamW)
    assert {name for name in adam if adam[name] != adamw.get(name)} == {
        "weight_decay",
        "decoupled_weight_decay",
    }


@CLASSES
def test_repr_is_torchs_where_only_torchs_arguments_are_set(cls):
    theirs = {FusedAdam: torch.optim.Adam, FusedAdamW: torch.optim.AdamW}[cls]
    text = repr(cls([torch.zeros(1)], lr=0.1))
    assert text.replace(cls.__name__, theirs.__name__) == repr(theirs([torch.zeros(1)], lr=0.1))


@CLASSES
def test_repr_shows_our_arguments_where_they_are_set(cls):
    params = [torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    optimizer = cls(
        params,
        precision="split32-bf16",
        seed=7,
        max_grad_norm=0.5,
        skip_nonfinite=True,
        skip_grad_norm=2.0,
        flatten=True,
        backend="reference",
    )
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        text = repr(each)
        assert text.endswith(
            "max_grad_norm: 0.5\nskip_nonfinite: True\nskip_grad_norm: 2.0\n"
            "flatten: True\nbackend: reference\n)"
        )
        assert "    precision: split32-bf16\n    seed: 7\n" in text  # of the param group
    assert "grad_attribute: main_grad\n" in repr(cls(params, grad_attribute="main_grad"))
