"""What execution counts: on PTX written by hand, and of the kernels, whose aligned rows waste no
sector.
"""

import ptx_machine
import pytest
import torch
from process import outside_the_interpreter
from ptx_machine import Machine, Region
from test_machine import module

pytestmark = pytest.mark.skipif(bool(ptx_machine.why_not()), reason=ptx_machine.why_not())

SECTOR_BYTES = 32


@pytest.mark.parametrize(
    ("stride", "first", "sectors"),
    [
        (4, 0, 4),  # 128 bytes in a row
        (4, 4, 5),  # the same, one element on
        (16, 0, 16),  # two threads per sector
        (32, 0, 32),
        (128, 0, 32),
        (0, 0, 1),  # all threads the same
    ],
)
def test_a_warp_touches_each_sector_once(stride, first, sectors, tmp_path):
    """Two warps of two blocks, of which each has 31 threads that take part."""
    memory = torch.zeros(4096 + 64, dtype=torch.int32)
    start = memory[-memory.data_ptr() % 256 // 4 :]
    code = f"""
        and.b32 %r1, %r0, 31;
        mad.wide.s32 %d1, %r1, {stride}, %d0;
        setp.lt.s32 %p0, %r1, {{active}};
        @%p0 ld.global.b32 {{{{ %r2 }}}}, [ %d1 + {first} ];
        ret;"""
    for active in (32, 1):
        machine = Machine(module(1, code.format(active=active), threads=64), 0, tmp_path, True)
        region = Region(memory.data_ptr(), memory.nbytes, False)
        for _ in range(2):  # a launch counts anew
            machine(2, [start.data_ptr()], [region])
        [load] = [count for count in machine.counts() if count.instruction.guard]
        assert (load.blocks, load.warps) == (2, 4)
        assert load.requested_bytes == 4 * active * load.warps
        assert load.sectors == load.warps * (sectors if active == 32 else 1)


def test_instructions_of_a_loop_count_as_often_as_they_run(tmp_path):
    code = """
        mov.b32 %r1, 0;
        $L__loop:
        add.s32 %r1, %r1, 1;
        setp.lt.s32 %p0, %r1, 5;
        @%p0 bra $L__loop;
        ret;"""
    machine = Machine(module(0, code), 0, tmp_path, True)
    machine(3, [], [])
    blocks = {count.instruction.name: count.blocks for count in machine.counts()}
    assert blocks == {"mov": 3, "add": 15, "setp": 15, "bra": 15, "ret": 3}


MIXES = ["fp32", "bf16", "fp32-amsgrad", "bf16-fp32-state", "bf16-fp32-grad", "split24-bf16"]
# Scales of 8-bit moments are a sector for each access of a warp, which takes 4 to 32 groups.
INT8_SCALES = {"native-int8": 0.75, "split24-int8": 0.25}
VARIANTS = [*MIXES, *INT8_SCALES, "norm-fp32", "norm-bf16"]


@pytest.fixture(scope="module")
def runs():
    """What `inspect --run` says of each variant, static and executed, by variant and rows."""
    found = outside_the_interpreter(
        *("-m", "fused_adam_kernels.inspect", "--json", "--run", "--arch", "sm_90"),
        *("--variant", *VARIANTS),
    )
    return {(report["variant"], report.get("rows", "static")): report for report in found}


@pytest.mark.parametrize("variant", VARIANTS)
def test_aligned_rows_touch_no_sector_for_nothing(runs, variant):
    """Every byte of every sector is asked for, once."""
    run, least = runs[variant, "aligned"], runs[variant, "static"]["bytes_moved"]
    if variant in INT8_SCALES:
        assert run["sector_bytes"] - least == INT8_SCALES[variant]
    elif variant in MIXES:
        assert run["requested_bytes"] == run["sector_bytes"] == least
    else:  # and what a program stores, one sum
        assert least <= run["requested_bytes"] <= run["sector_bytes"] < 1.001 * least


@pytest.mark.parametrize("variant", MIXES)
def test_misaligned_rows_touch_one_more_sector_per_access(runs, variant):
    """A warp takes 32 elements in a row there: 4 sectors of fp32 and 2 of bf16, and one more."""
    run = runs[variant, "misaligned"]
    assert run["requested_bytes"] == runs[variant, "static"]["bytes_moved"]
    assert 1.2 < run["sector_bytes"] / run["requested_bytes"] <= 1.6


@pytest.mark.parametrize("variant", VARIANTS)
def test_executed_and_static_counts_agree(runs, variant):
    """PTX has one instruction for a root or a quotient, so machine code has more, and less than
    four times as many: its slow paths are counted as if they ran.
    """
    run = runs[variant, "aligned"]
    assert run["ptx_instructions"] < run["machine_instructions"] < 4 * run["ptx_instructions"]
    assert run["issue_ps"] < run["issue_most_ps"]
    assert runs[variant, "misaligned"]["ptx_instructions"] > run["ptx_instructions"]
    assert run["branches"] < runs[variant, "misaligned"]["branches"] or variant[:4] == "norm"
