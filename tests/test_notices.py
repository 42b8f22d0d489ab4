"""Notices that are said once."""

import logging

import pytest
from torch import nn

from bnext.notices import gathering_notices, holding_notices, log_notices, tell_once

log = logging.getLogger("bnext.tests.notices")


def test_the_same_notice_of_the_same_thing_is_said_once(caplog):
    for name in ("one", "one", "other"):
        tell_once(log, name, "%s is empty.", name)
    tell_once(log, "one", "%s is full.", "one")

    assert [record.getMessage() for record in caplog.records] == [
        "one is empty. This is said once.",
        "other is empty. This is said once.",
        "one is full. This is said once.",
    ]


def test_objects_are_told_apart_by_identity_and_may_die(caplog):
    first, second = nn.ReLU(), nn.ReLU()
    for layer in (first, second, first):
        tell_once(log, layer, "A layer.")
    assert len(caplog.records) == 2

    del first, layer
    tell_once(log, nn.ReLU(), "A layer.")
    assert len(caplog.records) == 3


def test_notices_that_are_held_are_said_later_and_after_an_exception_at_once(caplog):
    with holding_notices() as held:
        log.warning("100%% of %s", "boxes")
        assert not caplog.records
    assert held == [("bnext.tests.notices", logging.WARNING, "100% of boxes")]

    log_notices(held)
    with pytest.raises(KeyError):
        say_and_fail()

    assert [record.getMessage() for record in caplog.records] == ["100% of boxes", "before"]


def say_and_fail():
    with holding_notices():
        log.warning("before")
        raise KeyError


def test_norms_that_say_the_same_are_one_line(caplog):
    norms = [nn.ReLU() for _ in range(8)]
    with gathering_notices():
        for _ in range(2):
            for number, norm in enumerate(norms):
                tell_once(log, norm, "%s saw %d element.", f"norm{number}", 1)
        tell_once(log, "alone", "%s is another matter.", "norm9")
        assert not caplog.records

    assert [record.getMessage() for record in caplog.records] == [
        "norm0 saw 1 element. The same goes for norm1, norm2, norm3 and 4 more. This is said once.",
        "norm9 is another matter. This is said once.",
    ]


def test_notices_that_do_not_name_their_things_are_counted_and_an_exception_loses_none(caplog):
    def say():
        with gathering_notices():
            for _ in range(3):
                tell_once(log, nn.ReLU(), "A layer of 100%% zeros.")
            raise KeyError

    with pytest.raises(KeyError):
        say()
    (record,) = caplog.records
    assert record.getMessage() == "A layer of 100% zeros. The same goes for 2 more. This is said once."
