"""launch_scripts/english_corpus.py: what it reads out of Debian's packages, and that no paragraph comes twice."""

import gzip
import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "launch_scripts" / "english_corpus.py"


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("english_corpus", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def base64_number(corpus, value: int) -> str:
    digits = ""
    while value or not digits:
        digits, value = corpus.BASE64[value % 64] + digits, value // 64
    return digits


def test_a_dictionary_is_read_page_by_page(corpus, tmp_path):
    entries = ["00-database-info\n  about it", *(f"word{i}\n   meaning é " + "x" * 990 for i in range(9))]
    text, index, start = b"", [], 0
    for i, entry in enumerate(entries):
        data = f"{entry}\n".encode()
        place = f"{base64_number(corpus, start)}\t{base64_number(corpus, len(data))}"
        names = ["00databaseinfo"] if i == 0 else [f"word{i - 1}", f"synonym{i - 1}"]
        index += [f"{name}\t{place}" for name in names]
        text, start = text + data, start + len(data)
    folder = tmp_path / "usr/share/dictd"
    folder.mkdir(parents=True)
    (folder / "some.dict.dz").write_bytes(gzip.compress(text))
    (folder / "some.index").write_text("\n".join(sorted(index)) + "\n")
    found = list(corpus.documents_of(tmp_path))
    assert [page.count("word") for page in found] == [4, 4, 1]
    assert "\n\n".join(found) == "\n\n".join(entry.strip() for entry in entries[1:])


def test_the_kernels_documentation_in_english_only(corpus, tmp_path):
    for name in ("html/_sources/admin/a.rst.txt", "html/_sources/translations/it/b.rst.txt", "html/other/c.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert list(corpus.documents_of(tmp_path)) == ["html/_sources/admin/a.rst.txt"]


def test_no_paragraph_comes_twice(corpus):
    long, longer, new = ("one " * 60).strip(), ("two " * 80).strip(), ("three " * 50).strip()
    documents = [f"Title\n\n{long}\n\n{longer}", f"Title\n\n{longer.replace(' ', chr(10), 5)}\n\n{new}", long]
    assert list(corpus.without_repeats(documents)) == [documents[0], f"Title\n\n{new}"]
