"""The pages that users read, and the blocks in them. Runs none."""

import re
from typing import NamedTuple

from process import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int  # of its first line of text
    language: str  # what stands behind the fence
    text: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks(*languages):
    """Every block in one of these languages, or every block, page by page."""
    found = [
        Block(page, text[: match.start(2)].count("\n") + 1, match[1], match[2])
        for page, text in PAGES.items()
        for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.S | re.M)
    ]
    return [block for block in found if not languages or block.language in languages]


def the_block(page, snippet):
    """The one Python block of a page that contains the snippet."""
    [text] = [b.text for b in blocks("python") if b.page == page and snippet in b.text]
    return text
