"""launch_scripts/english_corpus.py: what it reads out of Debian's packages, and that no paragraph comes twice."""

import gzip
import hashlib
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


@pytest.fixture
def packages(corpus, tmp_path, monkeypatch):
    """Two files where Debian's mirror and archive would be; the mirror has only the first."""
    (tmp_path / "archive").mkdir()
    found = []
    for number, text in enumerate((b"one", b"two")):
        sha1, sha256 = hashlib.sha1(text).hexdigest(), hashlib.sha256(text).hexdigest()
        (tmp_path / "archive" / sha1).write_bytes(text)
        found.append(corpus.Package(f"p/{number}_all.deb", sha1, sha256))
    (tmp_path / "p").mkdir()
    (tmp_path / found[0].path).write_bytes(b"one")
    monkeypatch.setattr(corpus, "MIRROR", tmp_path.as_uri())
    monkeypatch.setattr(corpus, "ARCHIVE", (tmp_path / "archive").as_uri())
    monkeypatch.setattr(corpus, "PACKAGES", tuple(found))
    return found


def test_a_version_that_the_mirror_no_longer_has_comes_from_the_archive(corpus, packages, tmp_path):
    place = tmp_path / "here"
    place.mkdir()
    corpus.check(corpus.download(place))
    assert sorted(path.read_bytes() for path in place.iterdir()) == [b"one", b"two"]


def test_what_a_mirror_has_under_a_packages_name_is_checked(corpus, packages, tmp_path):
    (tmp_path / packages[0].path).write_bytes(b"an error page")
    corpus.check(corpus.download(tmp_path))
    (tmp_path / "archive" / packages[0].sha1).write_bytes(b"an error page")
    with pytest.raises(ValueError, match=r"0_all\.deb cannot be downloaded \(.*/p/.*: another file; .*another file\)"):
        corpus.download(tmp_path)


def test_what_cannot_be_downloaded_is_said_with_what_to_do(corpus, packages, tmp_path):
    (tmp_path / "archive" / packages[1].sha1).unlink()
    with pytest.raises(ValueError, match=rf"1_all\.deb cannot be downloaded \(.*{packages[1].sha1}.*--packages"):
        corpus.download(tmp_path)


def test_another_version_is_refused(corpus, packages, tmp_path):
    with pytest.raises(ValueError, match=rf"has no 0_all\.deb; download it from .*{packages[0].sha1}"):
        corpus.check(tmp_path)
    corpus.download(tmp_path)
    (tmp_path / packages[1].name).write_bytes(b"three")
    with pytest.raises(ValueError, match=rf"1_all\.deb has another sha256 than {packages[1].sha256}"):
        corpus.check(tmp_path)
