"""Findings as lines of a log: what they say, and how often."""

import logging

import pytest

from bnext import notices
from bnext.diagnostics.findings import Check, Evidence, Finding, Remedy
from bnext.diagnostics.tell_findings import tell_findings

log = logging.getLogger(__name__)


def find(layers=("norm",), severity="warning", **remedy):
    check = Check("BN099", "tired", "norms are tired", "Tired.", "", "", "static", lambda facts: ())
    return Finding(check, Evidence(severity, layers, "2 norms are tired.", Remedy(**remedy)))


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(notices, "_told_names", set())
    caplog.set_level(logging.DEBUG, __name__)
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_has_the_keys_apart_from_the_words_of_the_remedy(told):
    """Of several sentences the keys may mend by the first."""
    tell_findings(
        log, [find(text="Let them rest. More of them, do as well.", keys={"A.B": 1, "C": "x"}, call="f()")], "More."
    )

    words = "BN099: norms are tired. 2 norms are tired. Let them rest. More of them, do as well. In the config: A.B 1, "
    assert told() == [f"{words}C x. More. This is said once."]


@pytest.mark.parametrize(
    "code", [{"command": "bnext do"}, {"call": "bnext do"}, {"command": "bnext do", "call": "f()"}]
)
def test_a_line_has_the_code_where_there_are_no_keys(told, code):
    tell_findings(log, [find(text="Do.", **code)])

    assert told() == ["BN099: norms are tired. 2 norms are tired. Do. `bnext do` This is said once."]


def test_code_that_would_fill_a_page_is_left_to_the_report(told):
    tell_findings(log, [find(text="Do.", call="f(" + "x" * 300 + ")")])

    assert told() == ["BN099: norms are tired. 2 norms are tired. Do. This is said once."]


def test_notes_are_not_said(told):
    tell_findings(log, [find(severity="note", text="Rest.")])

    assert told() == []
