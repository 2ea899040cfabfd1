"""Which islands a round consists of, with a clock of the test's own."""

import pytest

from relora_ds.islands.membership import Membership
from relora_ds.islands.messages import PROTOCOL
from relora_ds.islands.refusals import LinkRefused
from relora_ds.islands.remembered import Part, State


class House:
    """A membership with a clock."""

    def __init__(self, state: State | None = None, **options):
        self.now = 100.0
        options = {"timeout_s": 60.0, "lease_s": 20.0, "keep_rounds": 200, **options}
        self.members = Membership(state or State(), now=self.now, **options)
        self.state = self.members.state

    def join(self, name, incarnation="1", **about):
        fields = {"protocol": PROTOCOL, "rank": 0, "world_size": 1, "count": 2, "identity": {"relora.r": 8}, "done": 0}
        return self.members.join(name, {**fields, "incarnation": f"{name}{incarnation}", **about}, self.now)

    def send(self, name, rank=0, keep_from=None, **part):
        """Send a rank's part for the open round; returns whether the island is complete with it."""
        keep_from = self.state.decided + 1 if keep_from is None else keep_from
        self.members.begin(name, rank, Part(**{"index": {f"w{rank}": 4}, "facts": {}, "keep_from": keep_from, **part}))
        return self.members.finish(name, rank, self.now) is not None

    def decide(self):
        """The names in the decision and those that it lacks, or None."""
        found = self.members.decide(self.now)
        return found and ([*found[0]], found[1])

    def restarted(self, **options):
        """A server that was killed here and starts again."""
        return House(State.of_json(self.state.as_json()), **options)


@pytest.fixture
def house():
    house = House()
    house.join("a")
    house.join("b")
    return house


def test_a_round_is_decided_when_all_have_contributed(house):
    assert house.send("b") and house.decide() is None
    assert house.send("a") and house.decide() == (["a", "b"], [])
    assert house.state.decided == 1 and house.decide() is None


def test_an_island_is_complete_with_the_last_of_its_ranks():
    house = House()
    house.join("a", world_size=3, count=1)
    assert not house.send("a", 2) and not house.send("a", 0)
    assert house.decide() is None
    assert house.send("a", 1) and house.decide() == (["a"], [])


def test_the_first_complete_contribution_counts(house):
    house.send("a", facts={"tokens": 1})
    house.now += 25
    house.join("a", "2")
    assert not house.members.wants("a", 0, 1)
    house.send("a", facts={"tokens": 2})
    house.send("b")
    taken, _ = house.members.decide(house.now)
    assert taken["a"].facts == {"tokens": 1} and taken["a"].incarnation == "a1"
    assert not house.members.wants("a", 0, 1), "of a decided round"


def test_parts_of_an_earlier_incarnation_do_not_complete_a_later_one():
    house = House()
    house.join("a", world_size=2, count=1)
    house.send("a", 0)
    house.now += 25
    house.join("a", "2", world_size=2, count=1)
    assert not house.send("a", 1) and house.decide() is None
    assert house.send("a", 0)


def test_a_late_island_is_missing_after_the_timeout(house):
    house.now += 500  # before the first complete contribution nothing times out
    assert house.decide() is None
    house.send("a")
    house.now += 59
    assert house.decide() is None
    house.now += 1
    assert house.decide() == (["a"], ["b"])


def test_an_island_that_missed_a_round_is_not_waited_for_until_it_joins_anew(house):
    house.send("a")
    house.now += 60
    assert house.decide() == (["a"], ["b"])
    house.send("a")
    assert house.decide() == (["a"], ["b"]), "at once"
    house.join("b")  # another rank of the same incarnation
    house.send("a")
    assert house.decide() == (["a"], ["b"])
    house.now += 20
    house.join("b", "2", done=3)
    house.send("a")
    assert house.decide() is None
    house.send("b")
    assert house.decide() == (["a", "b"], [])


def test_a_late_island_that_contributes_again_is_waited_for_again(house):
    house.send("a")
    house.now += 60
    assert house.decide() == (["a"], ["b"])
    house.send("b")
    assert house.decide() is None, "a was in the last decision"
    house.send("a")
    assert house.decide() == (["a", "b"], [])
    house.send("a")
    assert house.decide() is None


def test_an_island_that_has_never_joined_is_waited_for_in_the_first_round():
    house = House()
    house.join("a")
    house.send("a")
    assert house.decide() is None
    house.now += 60
    assert house.decide() == (["a"], [])
    house.send("a")
    assert house.decide() == (["a"], []), "at once"
    house.join("b")
    house.send("a")
    assert house.decide() is None


def test_rounds_are_decided_in_order(house):
    assert house.members.wants("a", 0, 1)
    with pytest.raises(LinkRefused, match="round: 2 cannot come before round 1, which is undecided"):
        house.members.wants("a", 0, 2)


def test_a_name_belongs_to_a_living_incarnation(house):
    house.now += 15
    house.members.hear("a", "a1", 0, house.now)
    house.now += 15
    assert not house.join("a", "2") and house.members.silent_s("a", house.now) == 15
    house.now += 5
    assert house.join("a", "2")
    with pytest.raises(LinkRefused, match="islands.name: another process has joined as 'a' meanwhile"):
        house.members.hear("a", "a1", 0, house.now)


def test_a_server_that_was_down_takes_no_island_for_dead(house):
    house = house.restarted()
    assert not house.join("a", "2") and house.members.silent_s("a", house.now) is None
    house.now += 20
    assert house.join("a", "2")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"identity": {"relora.r": 16}}, "relora.r is 16 here and 8 on island 'a'; start all islands with the same"),
        ({"identity": {}}, "relora.r is null here and 8 on island 'a'"),
        ({"identity": {"relora.r": 8, "seed": 1}}, "seed is 1 here and null on island 'a'"),
        ({"count": 3}, "islands.count is 3 here and 2 on island 'a'"),
        ({"protocol": 99}, "speaks version 99 of the link"),
        ({"rank": 1}, "rank 1 of 'c' is not one of its 1"),
    ],
)
def test_other_islands_are_refused(about, message):
    house = House()
    house.join("a")
    with pytest.raises(LinkRefused, match=message):
        house.join("c", **about)
    assert [*house.state.islands] == ["a"]


def test_a_run_continues_where_a_new_version_has_another_key_at_null(house):
    house.join("a", "2", identity={"relora.r": 8, "data.deduplicate": None})
    house.join("b", "2", identity={"relora.r": 8, "data.deduplicate": None})
    assert [*house.state.islands] == ["a", "b"]


def test_more_islands_than_count_are_refused(house):
    with pytest.raises(LinkRefused, match="'c' is one more than islands.count = 2: the others are a, b"):
        house.join("c")
    house.now += 1000
    with pytest.raises(LinkRefused, match="one more"):
        house.join("c")


def test_ranks_that_contradict_each_other_are_refused():
    house = House()
    house.join("a", world_size=2)
    with pytest.raises(LinkRefused, match="another one 2; give each island a name of its own"):
        house.join("a", world_size=3)
    house.send("a", 0, facts={"tokens": 1})
    with pytest.raises(LinkRefused, match="facts: {'tokens': 2} on rank 1 and {'tokens': 1} on rank 0"):
        house.send("a", 1, facts={"tokens": 2})
    with pytest.raises(LinkRefused, match="ranks 0 and 1 of 'a' both send 'w0'"):
        house.send("a", 1, facts={"tokens": 1}, index={"w0": 4})
    assert house.send("a", 1, facts={"tokens": 1})


def test_an_empty_directory_begins_after_the_largest_round_that_is_applied():
    house = House()
    house.join("a", done=4)
    house.send("a")
    house.join("b", done=6)
    assert house.state.decided == 6 and house.state.oldest == 7 and not house.state.complete
    assert not house.members.wants("a", 0, 5)
    house.send("a")
    house.send("b")
    assert house.decide() == (["a", "b"], [])
    house.now += 60
    with pytest.raises(LinkRefused, match="'a' has applied round 9, and the server has decided 7"):
        house.join("a", "2", done=9)


def test_rounds_are_kept_while_an_island_may_need_them(house):
    for keep_from in (1, 1, 1, 3, 3, 6):
        house.send("a")
        house.send("b", keep_from=keep_from)
        house.decide()
        assert house.state.oldest == max(1, min(keep_from, house.state.decided))
    house.now += 60
    house.join("b", "2", done=2)
    assert house.state.islands["b"].keep_from == 3


def test_no_more_than_keep_rounds_are_kept():
    house = House(keep_rounds=3)
    house.join("a", count=1)
    for _ in range(5):
        house.send("a", keep_from=0)
        house.decide()
    assert house.state.oldest == 3


def test_what_is_complete_survives_the_server(house):
    house.send("a")
    house = house.restarted()
    assert not house.members.wants("a", 0, 1) and house.members.wants("b", 0, 1)
    house.now += 59
    assert house.decide() is None, "the time to wait begins anew"
    house.send("b")
    assert house.decide() == (["a", "b"], [])
