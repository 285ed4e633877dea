"""The frameworks' venv holds what constraints.txt pins and nothing else, and borrows torch."""

import pathlib
import re
import sysconfig
from importlib import metadata

import torch

ROOT = pathlib.Path(__file__).parents[2]
OWN = pathlib.Path(sysconfig.get_path("purelib"))


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_package_of_the_venv_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        normalized(line.partition("==")[0]): line.partition("==")[2]
        for line in lines
        if "==" in line
    }
    own = {normalized(each.name): each.version for each in metadata.distributions(path=[str(OWN)])}
    for name in ("pip", "fused-adam"):
        own.pop(name, None)
    assert {
        "accelerate",
        "deepspeed",
        "fastai",
        "lightning",
        "peft",
        "safetensors",
        "sentence-transformers",
        "torchtitan",
        "transformers",
        "trl",
    } <= own.keys()
    assert own.items() <= pins.items(), own.items() - pins.items()


def test_torch_lies_on_the_disk_once():
    assert OWN not in pathlib.Path(torch.__file__).parents
