"""What the compiler makes of the kernels for a GPU: compiled here without one, in a process of its
own.
"""

import itertools
import json

import pytest
from process import outside_the_interpreter

# Accesses per thread to elements, by their bits: loads and stores of the body; the tail takes 32
# bits at most. 1024 elements over 128 threads are 8 each: per operand two 128-bit accesses in fp32,
# one in bf16. Mixed: every operand takes 4 elements per access, so that no layout is converted.
NVIDIA = {
    "fp32": ({"128": 8}, {"128": 6}),
    "fp32-amsgrad": ({"128": 10}, {"128": 8}),
    "fp32-cautious": ({"128": 8}, {"128": 6}),
    "fp32-ema": ({"128": 10}, {"128": 8}),
    "bf16": ({"128": 4}, {"128": 3}),
    "bf16-ema": ({"128": 2, "64": 8}, {"128": 2, "64": 6}),
    "split32-bf16-ema": ({"128": 2, "64": 10}, {"128": 2, "64": 8}),
    "bf16-cautious": ({"128": 4}, {"128": 3}),
    "bf16-fp32-state": ({"128": 4, "64": 4}, {"128": 4, "64": 2}),
    "bf16-amsgrad": ({"128": 5}, {"128": 4}),
    "fp16": ({"128": 4}, {"128": 3}),
    "fp32-bf16-grad": ({"128": 6, "64": 2}, {"128": 6}),
    "bf16-fp32-grad": ({"128": 2, "64": 6}, {"64": 6}),
}
MIXES = [name for name in NVIDIA if not name.endswith(("-amsgrad", "-cautious"))] + ["fp64"]
# What is beside a parameter takes as many elements per access as the widest operand.
RECIPES = {
    "native-bf16": ({"128": 4, "64": 4}, {"128": 2, "64": 4}),
    "master32-fp32": ({"128": 6, "64": 4}, {"128": 6, "64": 2}),
    "split32-fp32": ({"128": 4, "64": 6}, {"128": 4, "64": 4}),
    "split32-bf16": ({"128": 5}, {"128": 4}),
    "split24-bf16": ({"128": 4, "64": 1}, {"128": 3, "64": 1}),
    "sr-bf16": ({"128": 4}, {"128": 3}),
}
# Recipes that draw random bits run under a limit of registers, which an H100 was faster with: bytes
# per thread that are spilled to keep it, at most.
SPILLED_BYTES = {"native-bf16": 8, "split32-bf16": 24, "split24-bf16": 16, "sr-bf16": 8}
SPILLED_BYTES |= {"native-int8": 16, "split24-int8": 32}
# Triton 3.9's own choice for sm_100: 64 registers, and two instructions that spill.
SPILLED_BYTES |= {"bf16-cautious": 8}
# int8 beside fp32 parameters takes 32 bits an access, and beside bf16 ones 64. What full blocks
# run, per element, is above the memory's budget of 126 and 95: an upper bound, so that it can only
# go down (5 of split24-int8's are what the limit of registers costs). Last: bytes of shared memory.
# One draw serves 8 elements, and threads of fp32 parameters have 4 next to each other: half of a
# draw goes to a neighbour, 8 bytes per thread.
INT8 = {
    "native-int8": (({"128": 4}, {"128": 2}), 153, 1024),
    "split24-int8": (({"128": 2, "64": 3}, {"128": 1, "64": 3}), 156, 128),
}
# 4 elements for each of 256 threads.
AMD = {
    "fp32": ({"128": 4}, {"128": 3}),
    "fp32-amsgrad": ({"128": 5}, {"128": 4}),
    "fp32-cautious": ({"128": 4}, {"128": 3}),
    "fp32-ema": ({"128": 5}, {"128": 4}),
    "bf16": ({"64": 4}, {"64": 3}),
    "bf16-cautious": ({"64": 4}, {"64": 3}),
    "bf16-fp32-state": ({"128": 2, "64": 2}, {"128": 2, "64": 1}),
}
OTHERS = ["fp64", "prologue", "prologue-skip-spikes", "prologue-ema"]
# 1024 elements over 128 threads: 8 each.
NORMS = {"norm-fp32": 2, "norm-bf16": 1}
NORM_TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120"]
ELSEWHERE = ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx942"]
UPDATES = [
    *((name, "sm_90") for name in (*NVIDIA, *RECIPES)),
    *((name, target) for name in AMD for target in ELSEWHERE),
]
# An H200 issues 33.4e12 instructions a second while it moves 4.3e12 bytes: 217 for fp32's 28 bytes,
# 108 for bf16's 14.
INSTRUCTIONS_PER_BYTE = 7.75


@pytest.fixture(scope="module")
def reports():
    """What `inspect` says of every case, by variant and target."""
    inspect = ("-m", "fused_adam_kernels.inspect", "--json")
    found = outside_the_interpreter(
        *inspect, "--arch", "sm_90", "--variant", *NVIDIA, *RECIPES, *INT8, *OTHERS
    )
    found += outside_the_interpreter(*inspect, "--arch", *ELSEWHERE, "--variant", *AMD)
    found += outside_the_interpreter(*inspect, "--arch", *NORM_TARGETS, "--variant", *NORMS)
    return {(report["variant"], report["target"]): report for report in found}


@pytest.mark.parametrize(("variant", "target"), [*UPDATES, *((name, "sm_90") for name in OTHERS)])
def test_arithmetic_is_correctly_rounded(reports, variant, target):
    """No fused multiply-adds, no approximate square root or division, nothing flushed to zero."""
    report = reports[variant, target]
    assert (report["sqrt"], report["div"], report["fused"]) == ("rn", "rn", 0)


@pytest.mark.parametrize("variant", INT8)
def test_8_bit_codes_are_correctly_rounded_too(reports, variant):
    """They take no root and no division: those there are the update's own."""
    report = reports[variant, "sm_90"]
    assert (report["sqrt"], report["div"], report["fused"]) == ("rn", "rn", 0)


@pytest.mark.parametrize(
    ("variant", "target"), [*UPDATES, *((name, "sm_90") for name in INT8), ("fp64", "sm_90")]
)
def test_no_double_precision_in_the_update(reports, variant, target):
    assert bool(reports[variant, target]["fp64"]) == (variant == "fp64")


@pytest.mark.parametrize(("variant", "target"), [*UPDATES, *((name, "sm_90") for name in OTHERS)])
def test_no_shared_memory_and_no_spills(reports, variant, target):
    """Shared memory would mean that a layout is converted."""
    report = reports[variant, target]
    assert report["shared_bytes"] == 0 and report["local_bytes"] <= SPILLED_BYTES.get(variant, 0)


@pytest.mark.parametrize(("variant", "target"), UPDATES)
def test_widest_accesses_the_dtypes_allow(reports, variant, target):
    report = reports[variant, target]
    wide = [
        {bits: n for bits, n in report[kind].items() if int(bits) > 32}
        for kind in ("loads", "stores")
    ]
    assert tuple(wide) == (AMD if target == "gfx942" else {**NVIDIA, **RECIPES})[variant]


@pytest.mark.parametrize(("variant", "target"), [case for case in UPDATES if case[1] != "gfx942"])
def test_fewer_instructions_than_the_memory_gives_time_for(reports, variant, target):
    """All that full blocks run, and the slow paths of roots and divisions."""
    report = reports[variant, target]
    assert 8 < report["per_element"] <= INSTRUCTIONS_PER_BYTE * report["bytes_moved"]


@pytest.mark.parametrize("variant", INT8)
def test_8_bit_states_have_wide_accesses_and_bounds(reports, variant):
    """The scales of a group go from thread to thread through shared memory: 4 bytes per group and
    moment at most.
    """
    report = reports[variant, "sm_90"]
    (loads, stores), bound, shared_bytes = INT8[variant]
    wide = [
        {bits: n for bits, n in report[kind].items() if int(bits) >= 64}
        for kind in ("loads", "stores")
    ]
    assert wide == [loads, stores] and report["local_bytes"] <= SPILLED_BYTES[variant]
    assert report["shared_bytes"] <= shared_bytes
    assert 8 < report["per_element"] <= bound


def test_what_full_blocks_run_is_counted_without_the_tail(reports):
    """The tail of a recipe draws random bits per element, and would be a third of the count."""
    for variant, least in (("fp32", 20), ("sr-bf16", 40)):
        report = reports[variant, "sm_90"]
        assert (
            report["instructions"] / 8 - report["per_element"] > least
        )  # 1024 elements over 128 threads


FUSED = """
import json, sys
from fused_adam_kernels.assembly import read_nvidia
from fused_adam_kernels.inspect import TARGETS, compiled
from fused_adam_kernels.variants import MIXES, RECIPES, update
target, mixes, options = json.loads(sys.argv[1])
print(json.dumps([
    (name, flags, read_nvidia(compiled(update(*mix, **flags), TARGETS[target]).asm)["fused"])
    for name, mix in (MIXES | RECIPES).items() if name in mixes
    for flags in options
]))
"""
FLAGS = ("amsgrad", "cautious", "ema")
PLAIN, EVERY_OPTION = dict.fromkeys(FLAGS, False), dict.fromkeys(FLAGS, True)
OPTIONS = [
    dict(zip(FLAGS, values, strict=True)) for values in itertools.product((False, True), repeat=3)
]


def fused(target, mixes, options):
    """Additions that vanished, of every mix that has some, by its name and options."""
    found = outside_the_interpreter("-c", FUSED, json.dumps([target, mixes, options]))
    assert len(found) == len(mixes) * len(options)
    return [case for case in found if case[-1] != 0]


@pytest.mark.parametrize(("target", "option"), [("sm_100", EVERY_OPTION), ("sm_120", PLAIN)])
def test_recipes_fuse_nothing_on_blackwell(target, option):
    """There ptxas 12.9 (Triton 3.6) fuses what PTX keeps apart."""
    assert fused(target, [*RECIPES, *INT8], [option]) == []


@pytest.mark.long
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_no_mix_fuses_anything(target):
    assert fused(target, [*MIXES, *RECIPES, *INT8], OPTIONS) == []


FMAS = """
import json, re
from fused_adam_kernels.inspect import TARGETS, compiled
from fused_adam_kernels.variants import VARIANTS
print(json.dumps({
    name: len(re.findall(r"fma.rn.f", compiled(VARIANTS[name], TARGETS["sm_90"]).asm["ptx"]))
    for name in ("fp32", "fp64", "native-int8")
}))
"""


def test_sums_next_to_products_are_fused_multiply_adds_already():
    """So no ptxas fuses them. If the compiler saw that their factor is 1, they would be sums."""
    elements = 8 + 2  # per thread: body and tail
    # Gradient, m, v. int8: two more per element, and one per group that a thread has part of.
    expected = {"fp32": 3 * elements, "fp64": 3 * elements, "native-int8": 5 * elements + 2 + 2}
    assert outside_the_interpreter("-c", FMAS) == expected


MAXIMA = """
import json, re
from fused_adam_kernels.inspect import TARGETS, compiled
from fused_adam_kernels.variants import VARIANTS
print(json.dumps([
    re.findall(r"max\\S*\\.f32", compiled(VARIANTS[name], TARGETS["sm_90"]).asm["ptx"])
    for name in ("fp32-amsgrad", "bf16-amsgrad")
]))
"""


def test_the_maximum_of_amsgrad_keeps_a_nan():
    """The interpreter keeps it whatever the kernel says."""
    for found in outside_the_interpreter("-c", MAXIMA):
        assert set(found) == {"max.NaN.f32"}


ADDRESSES = """
import json, re
from fused_adam_kernels.inspect import TARGETS, compiled
from fused_adam_kernels.variants import VARIANTS
print(json.dumps({
    name: re.findall(
        r"tt.addptr .* : (\\S+), (\\S+)",
        compiled(VARIANTS[name], TARGETS["sm_90"]).asm["ttir"],
    )
    for name in ("fp32-amsgrad", "norm-fp32")
}))
"""


def test_every_offset_to_an_element_is_64_bits_wide():
    """Parameters may have more than 2^31 elements."""
    found = outside_the_interpreter("-c", ADDRESSES)
    elements = {
        name: [offset for pointer, offset in pairs if "tensor" in pointer]
        for name, pairs in found.items()
    }
    assert elements == {
        "fp32-amsgrad": ["tensor<1024xi64>"] * 5
        + ["tensor<256xi64>"] * 5,  # body and tail of p, g, m, v, v_max
        "norm-fp32": ["tensor<1024xi64>"] * 2,  # body and tail
    }


NORM_LOOPS = """
import json, re
from fused_adam_kernels.inspect import TARGETS, compiled
from fused_adam_kernels.variants import VARIANTS
print(json.dumps({
    name: re.findall(
        r"scf[.]for.*?scf[.]yield",
        compiled(VARIANTS[name], TARGETS["sm_90"]).asm["ttir"],
        re.S,
    )
    for name in ("norm-fp32", "norm-bf16")
}))
"""


def test_gradient_norms_take_no_float64_per_element():
    """GPUs with little of it would be bound by it. Only lanes and chunks are added in float64."""
    for loops in outside_the_interpreter("-c", NORM_LOOPS).values():
        assert len(loops) == 2 and not any("f64" in loop for loop in loops)


@pytest.mark.parametrize("target", NORM_TARGETS)
@pytest.mark.parametrize("variant", NORMS)
def test_gradient_norms_load_vectors_and_fuse_nothing(reports, variant, target):
    report = reports[variant, target]
    assert report["loads"]["128"] == NORMS[variant]
    assert report["fused"] <= 0  # ptxas computes some additions twice
    assert (report["spills"], report["local_bytes"]) == (0, 0)
