#!/usr/bin/env python3
"""About 80 MB of English text without a hub, for experiments that should not see a text twice.

    python launch_scripts/english_corpus.py DIRECTORY
    python -m relora_ds reproduce main --scale mini            reads it from data/english
    python -m relora_ds reproduce main --scale small data.source=text data.path=DIRECTORY/train.jsonl \\
        data.validation=DIRECTORY/validation.jsonl

WikiText-2 and 17 books of Project Gutenberg, as relora_ds itself finds them, and three packages of Debian, fetched with
`apt-get download` and unpacked with `dpkg-deb`, not installed: the GNU Collaborative International Dictionary of
English (dict-gcide), the Free On-line Dictionary of Computing (dict-foldoc) and the kernel's documentation
(linux-doc-6.1). Paragraphs that were there before are dropped. Of every 50 documents one is for validation, and another
one, in tuning.jsonl, to choose settings on. Debian's packages change with its releases: DIRECTORY/NOTICE names them.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dict-gcide", "dict-foldoc", "linux-doc-6.1")
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"  # dictd's digits, the highest first
DOCUMENT = 4000  # characters of dictionary entries that make one document
SHORT_PARAGRAPH = 80  # characters; shorter ones, such as headings, may repeat
SHORT_DOCUMENT = 200
HELD_OUT = {0: "validation", 25: "tuning"}  # of every 50 documents
NOTICE = """\
Text of WikiText-2 (Wikipedia's contributors, CC BY-SA), Project Gutenberg (public domain in the United States), and of
these packages of Debian, under the licences in their files `copyright`:
{packages}
Repeated paragraphs are dropped; otherwise unmodified.
"""


def main() -> int:
    """Write train.jsonl, validation.jsonl, tuning.jsonl and NOTICE."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="is made; its files are replaced")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="where the .deb files are already")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        try:
            packages = arguments.packages or _download(Path(name))
            trees = [_unpack(path, Path(name)) for path in sorted(packages.glob("*.deb"))]
        except (OSError, subprocess.CalledProcessError) as error:
            print(
                f"error: Debian's packages cannot be had ({error}); on another system, give their directory with "
                "--packages",
                file=sys.stderr,
            )
            return 1
        documents = without_repeats((*_own(), *(text for tree in trees for text in documents_of(tree))))
        arguments.directory.mkdir(parents=True, exist_ok=True)
        _write(arguments.directory, documents)
        versions = "\n".join(f"  {path.name}" for path in sorted(packages.glob("*.deb")))
        (arguments.directory / "NOTICE").write_text(NOTICE.format(packages=versions), encoding="utf-8")
    return 0


def documents_of(tree: Path) -> Iterator[str]:
    """Yield the documents in an unpacked package."""
    for index in sorted(tree.rglob("*.index")):
        text = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())  # dictzip is gzip
        yield from pages(text, index.read_text(encoding="utf-8"))
    for path in sorted(tree.rglob("_sources/**/*.txt")):
        if "translations" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="replace")


def pages(text: bytes, index: str) -> Iterator[str]:
    """Entries of a dictd dictionary in the order of its text, as many together as fill a page."""
    places = {
        tuple(map(_number, line.split("\t")[1:3]))
        for line in index.splitlines()
        if line.count("\t") >= 2 and not line.startswith("00")
    }  # 00-database-…: about the dictionary
    page: list[str] = []
    for start, length in sorted(places):
        page.append(text[start : start + length].decode("utf-8", errors="replace").strip())
        if sum(map(len, page)) >= DOCUMENT:
            yield "\n\n".join(page)
            page = []
    if page:
        yield "\n\n".join(page)


def without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """Yield the documents without paragraphs that came before, whatever their line breaks; those that keep enough."""
    seen: set[bytes] = set()
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document):
            words = " ".join(paragraph.split())
            digest = hashlib.sha256(words.encode()).digest()
            if len(words) < SHORT_PARAGRAPH or digest not in seen:
                kept.append(paragraph.rstrip())
                seen.add(digest)
        if len(text := "\n\n".join(kept).strip()) >= SHORT_DOCUMENT:
            yield text


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + BASE64.index(digit)
    return value


def _own() -> Iterator[str]:
    from relora_ds.config import DataConfig
    from relora_ds.data import documents

    for source in ("wikitext2", "gutenberg"):
        for split in ("train", "validation"):
            yield from documents(DataConfig(source=source), split)


def _download(directory: Path) -> Path:
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=directory, check=True, stdout=subprocess.DEVNULL)
    return directory


def _unpack(package: Path, directory: Path) -> Path:
    tree = directory / package.stem
    subprocess.run(["dpkg-deb", "-x", str(package), str(tree)], check=True)
    return tree


def _write(directory: Path, documents: Iterable[str]) -> None:
    sizes = {split: [0, 0] for split in ("train", *HELD_OUT.values())}
    files = {split: (directory / f"{split}.jsonl").open("w", encoding="utf-8") for split in sizes}
    for number, text in enumerate(documents):
        split = HELD_OUT.get(number % 50, "train")
        files[split].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        sizes[split][0] += 1
        sizes[split][1] += len(text)
    for split, file in files.items():
        file.close()
        print(f"{file.name}: {sizes[split][0]:,} documents, {sizes[split][1] / 1e6:.1f} M characters")


if __name__ == "__main__":
    sys.exit(main())
