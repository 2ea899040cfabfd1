"""The pages of the documentation, and what is fenced in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# The generated reports of suites are ignored by git, and no pages.
PAGES = sorted(path for path in DOCS.rglob("*.md") if not path.match("results/*/*.md"))
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    """Return the path of a page as links and messages write it."""
    return page.relative_to(ROOT).as_posix()


def fenced(page: Path, language: str) -> list[str]:
    """Return the contents of the fenced blocks of a language, in the order of the page."""
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for found, code in blocks if found == language]


def commands(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, without comments, continued lines joined."""
    lines = "".join(fenced(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
