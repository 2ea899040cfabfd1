"""Numbers as people read them."""


def human_bytes(size: float) -> str:
    """Return bytes in a unit that fits: 1536 -> '1.54 kB'."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError


def human_count(number: float) -> str:
    """Return a count in a unit that fits: 2410000 -> '2.41M'."""
    for unit in ("", "k", "M", "B"):
        if abs(number) < 1000 or unit == "B":
            return f"{number:.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    raise AssertionError
