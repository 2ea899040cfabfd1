"""The site is built without a warning: every page in the navigation, every link and every anchor leading somewhere."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT


class _Page(HTMLParser):
    """The links and ids of a page, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.ids, self.loads = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found["id"]} if "id" in found else set()
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.loads += [found[name] for name in ("src", "href") if tag in ("img", "script", "link") and found.get(name)]


def build(checkout: Path) -> subprocess.CompletedProcess:
    """Build the site of a checkout by the documented command."""
    environment = os.environ | {
        "VIRTUAL_ENV": sys.prefix,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["bash", "launch_scripts/docs.sh"]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What the site is built from."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("mkdocs.yml", "pyproject.toml", "CHANGELOG.md", "README.md"):
        shutil.copy(ROOT / name, folder)
    for name in ("docs", "examples", "launch_scripts"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def site(checkout) -> Path:
    done = build(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr, done.stdout + done.stderr
    return checkout / "site"


def test_every_page_is_built(site):
    built = {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")}
    assert {path.relative_to(DOCS).as_posix() for path in PAGES} == built - {"404.md"}


def test_every_link_leads_somewhere(site):
    pages = {path: _Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            if not re.match(r"https?://|mailto:", link) and (
                not target.is_file() or (anchor and target in pages and anchor not in pages[target].ids)
            ):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken
    assert len(pages) > 20


def test_examples_are_shown_whole(site):
    """A formatter once took the line that includes a file for Python."""
    index = (site / "search/search_index.json").read_text(encoding="utf-8")
    for path in (ROOT / "examples").iterdir():
        if path.is_file():
            first, second, *_ = path.read_text(encoding="utf-8").splitlines()
            assert (second if first.startswith("#!") else first).strip('"# ') in index, path


def test_nothing_is_loaded_from_other_servers(site):
    for path in site.rglob("*.html"):
        loads = [one for one in _Page(path).loads if re.match(r"(https?:)?//", one)]
        assert not loads, (path, loads)


def test_the_search_knows_the_pages(site):
    index = (site / "search/search_index.json").read_text(encoding="utf-8")
    assert "guides/resume.html" in index and "magnitude_joint" in index


def test_the_search_finds_names_within_a_line_of_code(site):
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    texts = {page["location"]: html.unescape(page["text"]) for page in index["docs"]}
    for page, name in (
        ("guides/hf_trainer.html#resume", "resume_from_checkpoint"),  # trainer.train(resume_from_checkpoint=True)
        ("guides/memory.html", "zero3"),  # deepspeed=zero3
    ):
        assert name in re.split(index["config"]["separator"], texts[page]), name


def test_a_broken_link_fails_the_build(checkout, tmp_path):
    """Last: it breaks the copy."""
    page = checkout / "docs/guides/faq.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(f"{text}\n[x](nowhere.md) [x](models.md#no-such-heading)\n", encoding="utf-8")
    done = build(checkout)
    page.write_text(text, encoding="utf-8")
    assert done.returncode != 0
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line]
    for target in ("nowhere.md", "no-such-heading"):
        assert any(target in line for line in warnings), (target, warnings)
