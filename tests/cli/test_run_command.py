"""The status and the one line of a command."""

import errno
import signal

import pytest

from bnext.cli.run_command import run_command
from bnext.errors import ConfigError


def fail(error):
    def command():
        raise error

    return command


def test_a_mistake_is_one_line(capsys):
    assert run_command(fail(ConfigError.of("a", "be b", got="c", remedy="Mend it."))) == 2
    assert capsys.readouterr().err == "error: a must be b; got c. Mend it.\n"


def test_a_file_that_the_machine_refuses_is_one_line(capsys):
    assert run_command(fail(OSError(errno.ENOSPC, "No space left on device", "out/a.pth"))) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert "'out/a.pth'" in line
    assert line.count("\n") == 1


def test_a_bug_stays_a_traceback():
    with pytest.raises(KeyError):
        run_command(fail(KeyError("a")))


def interrupt_hidden_by_another_error():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        raise RuntimeError("what a C++ library says of it")


@pytest.mark.parametrize(
    ("command", "say_kept", "line"),
    [
        (fail(KeyboardInterrupt()), None, "interrupted."),
        (fail(KeyboardInterrupt("a is kept")), None, "interrupted; a is kept."),
        (fail(KeyboardInterrupt()), lambda: "b is kept", "interrupted; b is kept."),
        (interrupt_hidden_by_another_error, None, "interrupted."),
    ],
)
def test_ctrl_c_is_one_line_with_what_is_kept(capsys, command, say_kept, line):
    before = signal.getsignal(signal.SIGINT)
    assert run_command(command, say_kept) == 130
    assert capsys.readouterr().err == f"{line}\n"
    assert signal.getsignal(signal.SIGINT) is before
