"""`bnext doctor` on images."""

from bnext.cli.main import main
from tests import tiny


def test_a_few_batches(digits, capsys):
    assert main(["doctor", "--config-file", str(tiny.CONFIG), "--data", "--num-images", "2"]) == 0

    said = capsys.readouterr().out
    assert "BN001" in said
    assert "Their means are up to" in said  # which only a forward knows
    assert "not known: Batches of 2 images" in said


def test_there_is_no_image(digits, capsys):
    assert main(["doctor", "--config-file", str(tiny.CONFIG), "--data", "--num-images", "0"]) != 0
    assert "--num-images must be 1 or more" in capsys.readouterr().err
