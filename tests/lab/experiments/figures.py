"""Draw the figures of suites in docs/results again: `python -m tests.lab.experiments.figures`.

Each has in its file what it was drawn from, as a digest. Spectra are drawn where the runs are, by `reproduce` itself.
"""

import functools
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

from PIL import Image, PngImagePlugin

from relora_ds.lab.experiments import suite_report
from relora_ds.lab.experiments.suites import suite_names
from relora_ds.lab.figures.plot_experiments import save_suite
from tests.lab.experiments.results import PAGES, RESULTS, measured

FIGURE = re.compile(r"!\[[^\]]*\]\((?:docs/results/)?(\w+)/(\w+)\.png\)")
SPECTRA = "singular_values"


def shown() -> list[tuple[str, str, str]]:
    """Return the figures of the pages as (scale, suite, figure), but for spectra."""
    found = {match for page in PAGES for match in FIGURE.findall(page.read_text(encoding="utf-8"))}
    named = ((scale, _suite_of(stem), stem) for scale, stem in sorted(found))
    return [(scale, suite, stem.removeprefix(f"{suite}_")) for scale, suite, stem in named if SPECTRA not in stem]


def _suite_of(stem: str) -> str:
    return max((name for name in suite_names() if stem.startswith(f"{name}_")), key=len)


def file_of(scale: str, suite: str, figure: str) -> Path:
    return RESULTS / scale / f"{suite}_{figure}.png"


@functools.cache
def digest_of(scale: str, suite: str) -> str:
    """Return a digest of everything that the figures of a suite are drawn from."""
    drawn = json.dumps([*_drawn_from(scale, suite)[2:]], sort_keys=True)
    return hashlib.sha256(drawn.encode()).hexdigest()[:16]


def digest_in(file: Path) -> str | None:
    """Return the digest of what a figure was drawn from."""
    with Image.open(file) as image:
        return image.info.get("Source")


def _drawn_from(scale: str, name: str) -> tuple:
    suite, runs, rows = measured(scale, name)
    blocks = suite_report.blocks(suite, rows, len(runs))
    curves, sweeps, links = suite_report.curves(rows), suite_report.sweeps(rows), suite_report.links(rows)
    return suite.title, blocks, curves, suite.reference, sweeps, links


def draw(scale: str, suite: str, figures: list[str]) -> None:
    """Draw some figures of a suite from its kept results."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Source", digest_of(scale, suite))
    with tempfile.TemporaryDirectory() as directory:
        save_suite(suite, *_drawn_from(scale, suite), None, Path(directory))
        for figure in figures:
            file = Path(directory) / f"{suite}_{figure}.png"
            with Image.open(file) as image:
                image.save(file, pnginfo=about, dpi=image.info.get("dpi"), optimize=True)
            shutil.copyfile(file, file_of(scale, suite, figure))


if __name__ == "__main__":
    wanted: dict[tuple[str, str], list[str]] = {}
    for scale, suite, figure in shown():
        if digest_in(file_of(scale, suite, figure)) != digest_of(scale, suite):
            wanted.setdefault((scale, suite), []).append(figure)
    for (scale, suite), figures in wanted.items():
        draw(scale, suite, figures)
