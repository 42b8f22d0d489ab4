"""What of a log is on the screen, and what is in log.txt: all of it, without a terminal's codes."""

import io
import logging
import sys

import pytest

from bnext.engine import screen
from bnext.engine.screen import VERBOSE, only_in_file, set_up_logging

RED = "\x1b[38;5;204mMODEL\x1b[39m"


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Loggers that are set up as in a process of their own; the screen and the file."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.delenv(VERBOSE, raising=False)
    set_up_logging(str(tmp_path))

    def read():
        for handler in logging.getLogger("bnext").handlers:
            handler.flush()
        return stream.getvalue(), (tmp_path / "log.txt").read_text()

    return read


def say_all():
    logging.getLogger("detectron2.data.common").info("Serializing")
    logging.getLogger("detectron2.data.common").warning("no pictures")
    logging.getLogger("detectron2.engine.defaults").info("Model:\nRetinaNet(")
    logging.getLogger("detectron2.utils.events").info("iter: 19")
    logging.getLogger("detectron2.engine.train_loop").error("The training ends: a picture is broken")  # error: says it
    logging.getLogger("fvcore.common.checkpoint").info("Saving checkpoint")
    logging.getLogger("bnext.evaluation").debug("twelve numbers")
    logging.getLogger("bnext.evaluation").info("one table")


def test_the_screen_shows_what_a_person_reads_and_the_file_has_all(log):
    say_all()
    shown, logged = log()
    assert [line.partition("]: ")[2] for line in shown.splitlines()] == [
        "WARNING no pictures",
        "iter: 19",
        "Saving checkpoint",
        "one table",
    ]
    for text in (
        "Serializing",
        "no pictures",
        "RetinaNet(",
        "iter: 19",
        "Saving",
        "twelve numbers",
        "one table",
        "broken",
    ):
        assert logged.count(text) == 1
    assert "detectron2.data.common WARNING: no pictures" in logged


def test_verbose_shows_all(log, monkeypatch):
    monkeypatch.setenv(VERBOSE, "1")
    say_all()
    shown, logged = log()
    assert len(shown.splitlines()) == len(logged.splitlines())


def test_no_codes_of_a_terminal_where_there_is_none(log):
    logging.getLogger("detectron2").info("config:\n%s", RED)
    for text in log():
        assert "\x1b" not in text
        assert "\nMODEL\n" in text


def test_a_logger_may_be_for_the_file_alone_but_its_warnings_are_shown(log):
    logger = logging.getLogger("bnext.evaluation")
    with only_in_file("bnext.evaluation"):
        logger.info("a detail")
        logger.error("a fault")
    logger.info("a result")
    shown, logged = log()
    assert ("a detail" in shown, "a detail" in logged) == (False, True)
    assert "ERROR a fault" in shown
    assert "a result" in shown


def test_a_second_run_in_a_process_has_one_screen(log, tmp_path, capsys):
    set_up_logging(str(tmp_path / "second"))
    logging.getLogger("bnext").info("a line")
    assert (capsys.readouterr().out.count("a line"), log()[0]) == (1, "")
    assert "a line" in (tmp_path / "second/log.txt").read_text()


def test_a_long_evaluation_gives_a_sign_of_life_a_minute(log, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    logger = logging.getLogger("detectron2.evaluation.evaluator")
    logger.info("Start inference on 5000 batches")
    for now[0] in (5.0, 59.0, 61.0, 66.0, 122.0):
        logger.info("Inference done %s", now[0])
    assert [line.split()[-1] for line in log()[0].splitlines()] == ["61.0", "122.0"]
