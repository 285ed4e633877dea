"""`inspect --run`: what kernels ask for when they are executed on the CPU, next to a card's limits.

tests/machine executes them, so this needs a checkout.
"""

import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

from .assembly import Report


class Card(NamedTuple):
    """What one GPU can do per second.

    Attributes:
        target: a key of TARGETS.
        issue_slots: warp instructions.
        memory_bytes: to and from its memory, as a copy was measured.
    """

    target: str
    issue_slots: float
    memory_bytes: float


CARDS = {
    # 132 multiprocessors of 4 schedulers at 1.98 GHz: NVIDIA's "H100 Tensor Core GPU Architecture",
    # and the largest clock that nvidia-smi names. Bytes: bench/results/h100-verify.json.
    "h100": Card("sm_90", 132 * 4 * 1.98e9, 2.9e12),
}
WARP = 32  # threads
CHECKOUT = pathlib.Path(__file__).parents[2]
COUNTS_SCRIPT = CHECKOUT / "tests" / "machine" / "ptx_counts.py"


class RunReport(NamedTuple):
    """What one launch over one long row executed, per element, and the time it takes at least.

    Counts are those of PTX, before ptxas. There a root or a quotient is one instruction, where
    machine code takes 8 to 20. Accesses to elements are the same in both.
    """

    variant: str
    target: str
    rows: str  # "aligned": all operands are. "misaligned": all are one element off.
    requested_bytes: float  # by all threads
    sector_bytes: float  # 32-byte sectors that warps touch, once for each access of a warp
    ptx_instructions: float
    branches: float  # per program; none divides a warp, else the launch ends with an error
    machine_instructions: float | None  # Report.per_element, of full blocks: aligned rows alone
    memory_ps: float  # per element: each input read once and each output written once
    issue_ps: float  # per element: `ptx_instructions`
    issue_most_ps: float | None  # per element: `machine_instructions`, with every slow path


def run(reports: list[Report], card: Card) -> list[RunReport]:
    """Execute variants on the CPU: those of `reports` for the card's target.

    Raises:
        RuntimeError: nothing can be executed here.
    """
    static = {report.variant: report for report in reports if report.bytes_moved is not None}
    # A process of its own, so that nothing here imports from the tests.
    paths = [str(CHECKOUT), str(CHECKOUT / "kernels")]
    done = subprocess.run(
        [sys.executable, str(COUNTS_SCRIPT), "--arch", card.target, "--variant", *static],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    found = []
    for counts in json.loads(done.stdout):
        report = static[counts["variant"]]
        most = report.per_element if counts["rows"] == "aligned" else None
        issue_ps = 1e12 / WARP / card.issue_slots  # per instruction of one element
        assert report.bytes_moved is not None
        found.append(
            RunReport(
                **counts,
                machine_instructions=most,
                memory_ps=report.bytes_moved / card.memory_bytes * 1e12,
                issue_ps=counts["ptx_instructions"] * issue_ps,
                issue_most_ps=None if most is None else most * issue_ps,
            )
        )
    return found


RUN_HEADER = [
    "kernel",
    "target",
    "rows",
    "B/elem",
    "asked",
    "sectors",
    "branches",
    "ptx/elem",
    "body/elem",
    "memory_ps",
    "issue_ps",
]


def run_cells(report: RunReport, bytes_moved: float | None) -> list[str]:
    """One row of the table, in the order of RUN_HEADER."""
    most = report.issue_most_ps
    return [
        report.variant,
        report.target,
        report.rows,
        str(bytes_moved),
        f"{report.requested_bytes:.2f}",
        f"{report.sector_bytes:.2f}",
        f"{report.branches:.0f}",
        f"{report.ptx_instructions:.1f}",
        "-" if report.machine_instructions is None else f"{report.machine_instructions:.1f}",
        f"{report.memory_ps:.2f}",
        f"{report.issue_ps:.2f}" + ("" if most is None else f"-{most:.2f}"),
    ]
