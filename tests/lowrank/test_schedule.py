"""The jagged curves: their check values, and that restarts by hand shape them."""

import pytest

from relora_ds.lowrank.schedule import lr_multiplier, scheduled_restarts

SHORT = dict(total_steps=1000, warmup_steps=50, restart_warmup_steps=10, restart_every=200, min_lr_ratio=0.1)
LONG = dict(total_steps=15000, warmup_steps=500, restart_warmup_steps=100, restart_every=5000, min_lr_ratio=0.1)


WSD = {**SHORT, "schedule": "wsd", "decay_steps": 180}  # it decays from step 820 on
LINEAR = {**SHORT, "schedule": "linear"}
CONSTANT = {**SHORT, "schedule": "constant"}


@pytest.mark.parametrize(
    "schedule, step, value",
    [
        (SHORT, 25, 0.5),
        (SHORT, 50, 1),
        (SHORT, 199, 0.946469290935),
        (SHORT, 200, 0),
        (SHORT, 201, 0.093846541643),
        (SHORT, 205, 0.469232708215),
        (SHORT, 210, 0.938465416431),
        (SHORT, 400, 0),
        (SHORT, 410, 0.717038762013),
        (SHORT, 999, 0.100002460564),
        (LONG, 4999, 0.802614871261),
        (LONG, 5050, 0.397202881433),
        (LONG, 5100, 0.794405762866),
        (LONG, 10050, 0.165326153744),
        (WSD, 25, 0.5),
        (WSD, 199, 1),
        (WSD, 200, 0),
        (WSD, 205, 0.5),
        (WSD, 810, 1),
        (WSD, 820, 1),
        (WSD, 910, 1 - 0.9 / 2),
        (WSD, 999, 1 - 0.9 * 179 / 180),
        (WSD, 5000, 0.1),
        ({**WSD, "decay_steps": None, "restart_every": None}, 900, 1),  # a tenth of the curve
        ({**WSD, "decay_steps": None, "restart_every": None}, 950, 0.55),
        (LINEAR, 25, 0.5),
        (LINEAR, 50, 1),
        (LINEAR, 199, 1 - 0.9 * 149 / 950),
        (LINEAR, 200, 0),
        (LINEAR, 205, 0.5 * (1 - 0.9 * 160 / 950)),
        (LINEAR, 999, 1 - 0.9 * 949 / 950),
        (LINEAR, 5000, 0.1),
        (CONSTANT, 25, 0.5),
        (CONSTANT, 199, 1),
        (CONSTANT, 200, 0),
        (CONSTANT, 205, 0.5),
        (CONSTANT, 5000, 1),
    ],
)
def test_check_values(schedule, step, value):
    assert lr_multiplier(step, **schedule) == pytest.approx(value, abs=1e-9)


def test_recorded_restarts_take_the_place_of_the_calendar():
    plain = {**SHORT, "restart_every": None}
    assert lr_multiplier(200, **plain) > 0.9
    assert lr_multiplier(321, **plain, restarts=[321]) == 0
    assert lr_multiplier(322, **plain, restarts=[321]) == pytest.approx(0.1 * lr_multiplier(331, **plain))
    # What is recorded later does not change what was.
    assert lr_multiplier(320, **plain, restarts=[321]) == lr_multiplier(320, **plain)
    assert [lr_multiplier(k, **plain, restarts=[200, 400, 600, 800]) for k in range(1001)] == [
        lr_multiplier(k, **SHORT) for k in range(1001)
    ]


def test_a_restart_by_hand_inside_the_warmup_ramps_to_the_warmup():
    plain = {**SHORT, "restart_every": None}
    assert lr_multiplier(20, **plain, restarts=[20]) == 0
    assert lr_multiplier(30, **plain, restarts=[20]) == pytest.approx(30 / 50)


def test_no_restart_at_the_start_nor_at_the_end():
    assert scheduled_restarts(1000, 200) == [200, 400, 600, 800]
    assert scheduled_restarts(1001, 200)[-1] == 1000
    assert scheduled_restarts(1000, None) == []


def test_cosine_stays_at_its_end():
    assert lr_multiplier(5000, **{**SHORT, "restart_every": None}) == pytest.approx(0.1)


def test_a_restart_by_hand_before_the_decay_ramps_into_it():
    plain = {**WSD, "restart_every": None}
    assert lr_multiplier(820, **plain, restarts=[815]) == pytest.approx(0.5 * (1 - 0.9 * 5 / 180))


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule: 'cosin' is unknown \(did you mean cosine\?\); known: cosine, wsd"):
        lr_multiplier(3, total_steps=10, schedule="cosin")
