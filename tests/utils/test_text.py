"""Numbers are shown in the unit that fits."""

from relora_ds.utils.text import human_bytes, human_count


def test_bytes():
    assert [human_bytes(size) for size in (0, 999, 1536, 2.5e9, 7e15)] == [
        "0 B",
        "999 B",
        "1.54 kB",
        "2.50 GB",
        "7000.00 TB",
    ]


def test_counts():
    assert [human_count(number) for number in (7, 1536, 2_410_000, 5e12)] == ["7", "1.54k", "2.41M", "5000.00B"]
