"""Which repetitions of a parametrized test run every time (`pytest.mark.each_value_once`)."""

from collections import defaultdict


def combinations(items) -> list[list]:
    """Group the items of each test function with the marker; those that are slow by themselves are left out."""
    groups = defaultdict(list)
    for item in items:
        if item.get_closest_marker("each_value_once") and not item.get_closest_marker("slow"):
            groups[item.path, item.cls, item.originalname].append(item)
    return list(groups.values())


def covering(group: list) -> list:
    """Return repetitions in which every value of every parameter occurs, each time the one with the most new values."""
    values = {item: {(name, str(value)) for name, value in item.callspec.params.items()} for item in group}
    missing, chosen = set().union(*values.values()), []
    while missing:
        chosen.append(max(group, key=lambda item: len(values[item] & missing)))
        missing -= values[chosen[-1]]
    return chosen
