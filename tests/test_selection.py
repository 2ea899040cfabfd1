from itertools import product

from tests.selection import covering


class Item:
    """What `covering` reads of a pytest item."""

    def __init__(self, values: tuple):
        self.callspec, self.params = self, dict(enumerate(values))


def repetitions(*values) -> list[Item]:
    return [Item(row) for row in product(*values)]


def rows(items: list) -> list[tuple]:
    return [tuple(item.params.values()) for item in items]


def test_every_value_occurs_and_no_repetition_is_in_vain():
    chosen = rows(covering(repetitions((0, 1, 2, 3), ("fp32", "bf16"), (False, True))))
    assert len(chosen) == 4
    assert [set(column) for column in zip(*chosen, strict=True)] == [{0, 1, 2, 3}, {"fp32", "bf16"}, {False, True}]


def test_of_one_parameter_all_repetitions_are_chosen():
    assert rows(covering(repetitions("abc"))) == [("a",), ("b",), ("c",)]
