"""Bars for terminals, and lines above them."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios

from bnext.progress import AboveBars, Tracked, showing_progress, track


def test_off_a_terminal_nothing_is_shown(capsys):
    assert list(track(range(3), "counting")) == [0, 1, 2]
    with showing_progress("counting", 2, delay=0) as bar:
        bar.update()
    assert len(Tracked([1, 2], "counting")) == 2
    assert capsys.readouterr() == ("", "")


@contextlib.contextmanager
def terminal(monkeypatch):
    """A standard error stream that is one, and a function that reads what it shows."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def read():
        os.write(follower, b"<end>")
        text = ""
        while not text.endswith("<end>"):
            text += os.read(leader, 4096).decode()
        return text.removesuffix("<end>")

    with os.fdopen(follower, "w") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        yield read
    os.close(leader)


def test_a_terminal_has_a_bar_that_is_gone_when_all_is_done(monkeypatch):
    with terminal(monkeypatch) as read:
        with showing_progress("counting", 2, delay=0) as bar:
            bar.update()
            bar.refresh()
        shown = read()
    assert "counting:  50%" in shown
    assert shown.endswith("\r")


def test_what_is_quick_has_no_bar(monkeypatch):
    with terminal(monkeypatch) as read:
        assert list(track(range(3), "counting")) == [0, 1, 2]
        assert read() == ""


def test_lines_come_above_the_bars_and_those_that_are_not_shown_yet_stay_so():
    both = io.StringIO()
    with showing_progress("early", 2, stream=both, delay=0), showing_progress("late", 2, stream=both):
        AboveBars(both).write("a line\n")
    lines = both.getvalue().replace("\r", "\n").splitlines()
    assert "a line" in lines
    assert "late" not in both.getvalue()
    assert any(line.startswith("early") for line in lines[lines.index("a line") :])
