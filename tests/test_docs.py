"""Every block of every page runs as it stands, and what pages say of the code is so.

Blocks that need a training framework are files of examples/, which tests/integrations runs.
"""

import contextlib
import io
import pathlib
import re
import shlex
import tomllib

import pytest
import torch
from named import missing, named
from pages import PAGES, blocks, the_block
from process import ROOT
from test_layout import FLOOR, MODULES, name_of, room_of
from torch import nn

from bench import cli, report
from bench.harness.console import three_digits
from bench.harness.results import read
from bench.verify import HASH
from fused_adam.precision import parse

MAKEFILE = (ROOT / "Makefile").read_text()
CLASSIC = the_block("docs/training.md", "for epoch in range(50)")
QUICK_START = the_block("README.md", "for step in range(200)")


def run(text):
    """Run a block; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(text, "a page", "exec"), {})
    return printed.getvalue()


# Blocks
# ------------------------------------------------------------------------------------------------


def test_every_block_is_of_a_kind_that_a_test_runs():
    assert {block.language for block in blocks()} <= {
        "python",
        "python integration",
        "sh",
        *("math", ""),  # a formula, and a tree of files
    }
    assert len(blocks("python")) > 12 and len(blocks("python integration")) == 7


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a checkpoint
    run(block.text)


def lines_of_shell():
    return [
        pytest.param(line, id=f"{block.page}: {line.partition(' #')[0].strip()}")
        for block in blocks("sh")
        for line in block.text.splitlines()
    ]


@pytest.mark.parametrize("line", lines_of_shell())
def test_every_shell_line_is_a_command_that_exists(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z]+=\S+", words[0]):
        words.pop(0)
    match words:
        case ["pip", "install", "."]:
            pass
        case ["make", *targets]:
            assert targets and all(is_target(target) for target in targets)
        case ["torchrun", "--nproc-per-node", "2", example]:  # tests/integrations runs these
            assert pathlib.Path(example).exists()
        case ["python" | "python3" | ".venv/bin/python", "-m", "bench", *arguments]:
            parser, _ = cli.make_parsers()
            assert parser.parse_known_args(arguments)[1] == []
        case [".venv/bin/python", "-m", "pytest", *options, path, "-k", word]:
            assert options in ([], ["--ptx", "sm_90"])
            assert re.search(rf"^def test_\w*{word}", pathlib.Path(path).read_text(), re.M)
        case [python, "-m", "fused_adam_kernels.inspect", *arguments]:
            from fused_adam_kernels.inspect import TARGETS
            from fused_adam_kernels.variants import VARIANTS

            assert python in ("python", ".venv/bin/python")
            options = dict(zip(arguments[::2], arguments[1::2], strict=True))
            assert options["--arch"] in TARGETS and options["--variant"] in VARIANTS
        case _:
            raise AssertionError(f"no test knows this command: {line}")


def is_target(name):
    return re.search(rf"^\.PHONY:.* {name}( |$)", MAKEFILE, re.M) is not None


def test_every_make_target_in_the_text_exists():
    names = {
        name
        for text in PAGES.values()
        for words in re.findall(r"`make ([\w -]+)`", text)
        for name in words.split()
    }
    assert len(names) > 8 and all(map(is_target, names))


@pytest.mark.parametrize("block", blocks("python integration"), ids=str)
def test_every_framework_block_is_an_example(block):
    """tests/integrations/test_examples.py runs them."""
    lines = PAGES[block.page].splitlines()[: block.line - 1]
    name = re.search(r"examples/\w+\.py", next(line for line in reversed(lines) if "](" in line))[0]
    example = (ROOT / name).read_text()
    assert re.sub(r'\A""".*?"""\n\n', "", example, flags=re.S) == block.text


# The README's promises to a new user
# ------------------------------------------------------------------------------------------------


def test_the_readme_fits_on_a_screen():
    assert len(PAGES["README.md"].splitlines()) <= 100


def test_the_quick_start_learns():
    printed = run(QUICK_START)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed, re.M)]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[-1] < 1e-4
    slope, intercept = re.search(r"^learned y = (\S+) x \+ (\S+)$", printed, re.M).groups()
    assert abs(float(slope) - 2) < 0.01 and abs(float(intercept) - 1) < 0.01


def test_the_quick_start_changes_one_import():
    ours, theirs = "from fused_adam import FusedAdam as Adam", "from torch.optim import Adam"
    assert f"`{theirs}` becomes `{ours}`" in PAGES["README.md"]
    assert QUICK_START.count("fused_adam") == QUICK_START.count(ours) == 1
    of_torch = run(QUICK_START.replace(ours, theirs))
    assert of_torch.splitlines()[-1] == run(QUICK_START).splitlines()[-1]


# The usual first program
# ------------------------------------------------------------------------------------------------


def losses_of(text, monkeypatch):
    """Run a block; returns every loss its nn.MSELoss gave, and what it printed."""
    losses = []

    class Recording(nn.MSELoss):
        def forward(self, *args):
            loss = super().forward(*args)
            losses.append(loss.item())
            return loss

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(nn, "MSELoss", Recording)
        printed = run(text)
    return losses, printed


def test_first_program_trains_as_with_torch(monkeypatch):
    ours, printed = losses_of(CLASSIC, monkeypatch)
    theirs, theirs_printed = losses_of(
        CLASSIC.replace(
            "from fused_adam import FusedAdam", "from torch.optim import Adam as FusedAdam"
        ),
        monkeypatch,
    )
    assert len(ours) == len(theirs) == 50
    # Per step a weight of size one rounds by an ulp at most: 50 ulps, and the loss is quadratic in
    # the error's size.
    torch.testing.assert_close(ours, theirs, rtol=50 * torch.finfo(torch.float32).eps, atol=1e-6)
    assert re.findall(r"epoch (\d+): loss \d", printed) == ["10", "20", "30", "40", "50"]
    assert printed == theirs_printed


def test_first_program_differs_from_torchs_only_in_the_import():
    assert CLASSIC.count("FusedAdam") == 2
    assert "fused_adam" not in CLASSIC.replace("from fused_adam import FusedAdam", "")


# Numbers
# ------------------------------------------------------------------------------------------------


def rows_of_recipes():
    """Page, recipe, bytes of state, and bytes moved where the table has them."""
    pattern = r'^\| `(?:"(\S+)"|None)` \| ([\d.]+) \|(?: ([\d.]+) \|)?'
    return [
        (page, *row.groups())
        for page in ("README.md", "docs/precision.md")
        for row in re.finditer(pattern, PAGES[page], re.M)
    ]


@pytest.mark.parametrize(
    ("page", "name", "held", "moved"), rows_of_recipes(), ids=lambda value: str(value)
)
def test_recipes_cost_what_the_tables_say(page, name, held, moved):
    recipe = parse(name)
    dtype = torch.float32 if name and name.startswith("native") else torch.bfloat16
    assert recipe.held_bytes(dtype) == float(held)
    assert (moved is None) == (page == "README.md")
    assert moved is None or recipe.moved_bytes(dtype, dtype) == float(moved)


def test_seconds_of_streamed_state_follow_from_its_bytes():
    rows = re.findall(
        r"^\| (`.*?`)(, fp32 parameters)? \| ([\d.]+) \| (.*/.*) \|$",
        PAGES["docs/training.md"],
        re.M,
    )
    assert len(rows) == 8
    for name, native, held, cells in rows:
        recipe = parse(None if native else name.strip('`"'))
        dtype = torch.float32 if native or "native" in name else torch.bfloat16
        assert recipe.held_bytes(dtype) == float(held)
        *seconds, tokens = [[float(x) for x in cell.split("/")] for cell in cells.split("|")]
        for billions, (pcie4, pcie5) in zip((1, 8, 32), seconds, strict=True):
            assert pcie4 == round(float(held) * billions / 25, 2)
            assert pcie5 == round(float(held) * billions / 55, 2)
        assert tokens == [
            round(float(held) * flops / (4 * bandwidth) / 1000, 1)
            for flops, bandwidth in ((200e12, 25e9), (400e12, 55e9))
        ]


def test_every_recommended_recipe_has_a_row():
    by_page = {
        page: [name for other, name, *_ in rows_of_recipes() if other == page]
        for page in ("README.md", "docs/precision.md")
    }
    assert len(by_page["README.md"]) == 5 and set(by_page["README.md"]) < set(
        by_page["docs/precision.md"]
    )
    fp32 = parse(None)
    assert (fp32.held_bytes(torch.float32), fp32.moved_bytes(torch.float32, torch.float32)) == (
        8,
        28,
    )
    assert "`None` takes 8 bytes of state and moves 28" in PAGES["docs/precision.md"]


def test_tables_of_records_are_what_the_command_writes():
    """After a change: `python -m bench report --update docs/precision.md`."""
    pages = [page for page, text in PAGES.items() if "<!-- bench:" in text]
    assert pages
    for page in pages:
        assert report.update_document(PAGES[page], (ROOT / page).parent) == PAGES[page]


SPEED = {
    "gpt2": "GPT-2, 124 M",
    "llama-3-8b/16": "Llama 3 8B, shard of 16",
    "many-small": "2000 small tensors",
}


def test_the_readmes_times_are_those_of_the_records():
    rows = []
    for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        results = read(ROOT / "bench" / "results" / f"h100-step-{name}.json")["results"]
        eager = {(r["model"], r["optimizer"]): r for r in results if r["mode"] == "eager"}
        for model in SPEED:
            if (model, "FusedAdamW") in eager:
                ours, torchs = (eager[model, one] for one in ("FusedAdamW", "torch fused"))
                assert ours["dtype"] == dtype
                numbers = (one["step_ms"]["median"] for one in (ours, torchs))
                cells = [*numbers, ours["speedup"]["median"]]
                cells = [f"{SPEED[model]}, {name}", *map(three_digits, cells)]
                rows.append(f"| {' | '.join(cells)} |")
    shown = re.findall(r"^\| .*, (?:fp32|bf16) \|.*$", PAGES["README.md"], re.M)
    assert len(shown) > 3 and set(shown) <= set(rows)


def test_the_published_hash_is_the_tested_one():
    assert HASH in PAGES["docs/guarantees.md"]


def test_the_oldest_versions_are_the_same_everywhere():
    """torch 2.11 and Triton 3.6 are the oldest that these tests pass with; Python 3.11 is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=")
    stated = dict(
        re.match(r"(\w+)>=([\d.]+)", dependency).groups() for dependency in project["dependencies"]
    )
    assert {"python": python, **stated} == {"python": "3.11", "torch": "2.11", "triton": "3.6"}
    text = " ".join(PAGES["README.md"].split())
    assert (
        f"Python {python} or newer, PyTorch {stated['torch']} or newer, and on Linux Triton "
        f"{stated['triton']} or newer" in text
    )
    assert f"Python {python} or newer" in PAGES["CONTRIBUTING.md"]
    assert (
        f"install triton>={stated['triton']},"
        in (ROOT / "fused_adam" / "backends" / "choose.py").read_text()
    )
    assert re.search(rf"^TRITONS := {stated['triton']}\.0 ", MAKEFILE, re.M)


# References
# ------------------------------------------------------------------------------------------------


def test_every_guarantee_names_tests_that_exist():
    rows = re.findall(r"^\| \*\*.*$", PAGES["docs/guarantees.md"], re.M)
    assert len(rows) == 11 and all(len(row.split(" | ")) == 3 for row in rows)
    for row in rows:
        tests = named(row.split(" | ")[2])
        assert tests and all(path.startswith("tests/") for path, _ in tests)
    assert all(missing(text) == [] for text in PAGES.values())


def anchors(text):
    """The links' targets that headings make, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    pattern = r"`((?:fused_adam|kernels|tests|bench|examples|docs)/[\w/.]*\w\.\w+)"
    for name in re.findall(pattern, PAGES[page]):
        assert (ROOT / name).exists(), name


def tree():
    """The modules in docs/design.md's tree of files, from the top down."""
    [text] = [block.text for block in blocks("") if block.page == "docs/design.md"]
    folders, names = [], []
    for line in filter(None, text.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        words = line.split()
        if words[0].endswith("/"):
            folders = [*folders[:depth], words[0]]
        else:
            files = [word for word in words if word.endswith(".py") and "/" not in word]
            names += [("".join(folders[:depth]) + file) for file in files]
    return names


def test_the_design_page_has_every_module_once():
    there = [
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        if not path.is_relative_to(ROOT / "bench")
    ]
    inits = {name for name in there if name.endswith("__init__.py") and name.count("/") > 1}
    assert sorted(tree()) == sorted(set(there) - inits)


def test_the_design_page_lists_modules_from_the_top_down():
    floors = [FLOOR[room] for name in tree() if (room := room_of(name_of(ROOT / name)))]
    assert floors == sorted(floors, reverse=True)
