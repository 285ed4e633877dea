"""A kernel's PTX -> C that runs it on the CPU, block after block. Compiles and runs nothing.

Between barriers, shuffles and branches the threads of a block do not see each other, so each runs
alone, one after the other: a loop over the threads. All registers are arrays with an element per
thread. Blocks and threads run from the last to the first, as Triton's interpreter runs blocks from
the first to the last: a result that depends on the order would show.
"""

from __future__ import annotations

import pathlib

from ptx_instructions import (
    EACH_THREAD,
    WIDTH,
    access_bytes,
    condition,
    in_step,
    register,
    statement,
)
from ptx_text import Instruction, Kernel, Label

PRELUDE = (pathlib.Path(__file__).parent / "ptx_prelude.c").read_text()

SOURCE = """\
#define THREADS {threads}
#define SHARED_BYTES {shared}
#define COUNTING {counting}
#define CODE {code}
{prelude}
enum {{ {params}NUM_PARAMS }};
{registers}

static int block(const uint64_t *params) {{
epoch++;
memset(memory, 0xa5, sizeof memory); /* shared memory holds anything at first */
{body}
}}

int launch(const uint64_t *params, int64_t grid, const uint64_t (*allowed)[3], int64_t num_allowed,
           uint64_t *where) {{
  regions = allowed, num_regions = num_allowed, fault = where;
#if COUNTING
  memset(counts, 0, sizeof counts);
#endif
  for (cta = grid - 1; cta >= 0; cta--) {{
    if (block(params)) return 1;
  }}
  return 0;
}}
"""


def translate(kernel: Kernel, shared_bytes: int, counting: bool = False) -> str:
    """Return C with a function `launch`. A fault it reports names an index of `kernel.code`.

    Args:
        kernel: what `ptx_text.read` returned.
        shared_bytes: of shared memory, per block.
        counting: count what is executed; there is a function `counted` then.

    Raises:
        NotImplementedError: for an instruction that is not translated; the error names it.
    """
    return SOURCE.format(
        threads=kernel.threads,
        shared=shared_bytes,
        counting=int(counting),
        code=len(kernel.code),
        prelude=PRELUDE,
        params="".join(f"{name}, " for name in kernel.params),
        registers="\n".join(
            f"static uint{WIDTH[kind]}_t {register(f'%{prefix}{i}')}[THREADS];"
            for kind, prefix, total in kernel.registers
            for i in range(total)
        ),
        body="\n".join(_body(kernel.code, counting)),
    )


def _body(code: list[Instruction | Label], counting: bool) -> list[str]:
    """C for the code of one block."""
    lines: list[str] = []
    alone: list[str] = []  # what each thread runs without the others
    counts: list[str] = []  # of what is in `alone`

    def flush() -> None:
        if alone:
            lines.extend([f"{EACH_THREAD} {{", *alone, "}", *counts])
            alone.clear()
            counts.clear()

    targets = {
        item.operands[0] for item in code if isinstance(item, Instruction) and item.name == "bra"
    }
    for index, item in enumerate(code):
        if isinstance(item, Label):
            # Most labels are for debuggers: nothing branches there.
            if item.name in targets:
                flush()
                lines.append(f"{item.name[1:]}:;")
        elif in_step(item):
            flush()
            if counting:
                lines.append(f"counts[{index}][0]++;")
            lines.append(statement(index, item))
        else:
            if counting:
                counts.append(f"counts[{index}][0]++;")
                if size := access_bytes(item):
                    counts.append(f"count({index}, {size});")
            text = statement(index, item)
            when = f"if ({condition(item.guard)}) " if item.guard else ""
            alone.append(f"{when}{{ {text} }}")
    flush()
    return lines
