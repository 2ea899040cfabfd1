#!/usr/bin/env python3
"""About 80 MB of English text without a hub, for experiments that should not see a text twice.

    python launch_scripts/english_corpus.py DIRECTORY
    python -m relora_ds reproduce main --scale mini            reads it from data/english
    python -m relora_ds reproduce main --scale small data.source=text data.path=DIRECTORY/train.jsonl \\
        data.validation=DIRECTORY/validation.jsonl

WikiText-2 and 17 books of Project Gutenberg, as relora_ds itself finds them, and three packages of Debian, downloaded
and unpacked with `dpkg-deb`, not installed: the GNU Collaborative International Dictionary of English (dict-gcide),
the Free On-line Dictionary of Computing (dict-foldoc) and the kernel's documentation (linux-doc-6.1). Paragraphs that
were there before are dropped. Of every 50 documents one is for validation, and another one, in tuning.jsonl, to
choose settings on. The versions of the packages are fixed, so that everybody has the same text; DIRECTORY/NOTICE
names them.
"""

import argparse
import gzip
import hashlib
import http.client
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MIRROR = "https://deb.debian.org/debian/pool/main"  # has a version until the next one comes
ARCHIVE = "https://snapshot.debian.org/file"  # has every version, by its SHA-1
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"  # dictd's digits, the highest first
DOCUMENT = 4000  # characters of dictionary entries that make one document
SHORT_PARAGRAPH = 80  # characters; shorter ones, such as headings, may repeat
SHORT_DOCUMENT = 200
TIMEOUT_S = 60
HELD_OUT = {0: "validation", 25: "tuning"}  # of every 50 documents
NOTICE = """\
Text of WikiText-2 (Wikipedia's contributors, CC BY-SA), Project Gutenberg (public domain in the United States), and of
these packages of Debian, under the licences in their files `copyright`:
{packages}
Repeated paragraphs are dropped; otherwise unmodified.
"""


class Package(NamedTuple):
    """A file of Debian: its path below MIRROR, and its digests."""

    path: str
    sha1: str
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def urls(self) -> tuple[str, ...]:
        return f"{MIRROR}/{self.path}", f"{ARCHIVE}/{self.sha1}"

    def is_in(self, contents: bytes) -> bool:
        return hashlib.sha256(contents).hexdigest() == self.sha256


PACKAGES = (
    Package(
        "d/dict-foldoc/dict-foldoc_20230119-1_all.deb",
        "b2bde1b5adbc41b7dad4f920c2a466b3477e792f",
        "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
    ),
    Package(
        "d/dict-gcide/dict-gcide_0.48.5+nmu2_all.deb",
        "a731e5db951f4e5cc16d55bc42736be0768ba8c5",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
    ),
    Package(
        "l/linux/linux-doc-6.1_6.1.176-1_all.deb",
        "97a5e89b363de0a3439a2b0953a366683e859d77",
        "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
    ),
)


def main() -> int:
    """Write train.jsonl, validation.jsonl, tuning.jsonl and NOTICE."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="is made; its files are replaced")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="where the .deb files are already")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        try:
            if arguments.packages:
                check(arguments.packages)
            packages = arguments.packages or download(Path(name))
            trees = [_unpack(packages / package.name, Path(name)) for package in PACKAGES]
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        documents = without_repeats((*_own(), *(text for tree in trees for text in documents_of(tree))))
        arguments.directory.mkdir(parents=True, exist_ok=True)
        _write(arguments.directory, documents)
        versions = "\n".join(f"  {package.name}" for package in PACKAGES)
        (arguments.directory / "NOTICE").write_text(NOTICE.format(packages=versions), encoding="utf-8")
    return 0


def download(directory: Path) -> Path:
    """Download PACKAGES into a directory, and return it.

    Raises:
        ValueError: one of them cannot be had.
    """
    for package in PACKAGES:
        failures = []
        for url in package.urls:
            try:
                with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                    contents = answer.read()
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{url}: {error}")
                continue
            if package.is_in(contents):
                (directory / package.name).write_bytes(contents)
                break
            failures.append(f"{url}: another file")
        else:
            raise ValueError(
                f"{package.name} cannot be downloaded ({'; '.join(failures)}); give the directory that it is in with "
                "--packages"
            )
    return directory


def check(directory: Path) -> None:
    """Raise ValueError where a package is missing, or is another file than the one that is known."""
    for package in PACKAGES:
        path = directory / package.name
        if not path.is_file():
            raise ValueError(f"--packages: {directory} has no {package.name}; download it from {package.urls[-1]}")
        if not package.is_in(path.read_bytes()):
            raise ValueError(f"--packages: {path} has another sha256 than {package.sha256}; download it again")


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
