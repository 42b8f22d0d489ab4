"""`bnext check-gpu` tries itself on a CPU: a table, a file, and an exit status; no check stops another."""

import json

import pytest
import torch

from bnext.cli import check_gpu
from bnext.proofs import Check

CPU = torch.device("cpu")


def fail(device):
    raise RuntimeError("no such kernel")


def test_the_quick_form_is_right_on_a_cpu(tmp_path, capsys):
    file = tmp_path / "cpu.json"
    assert check_gpu.main(["--device", "cpu", "--quick", "--json", str(file)]) == 0
    assert "parity, float32" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["about"]["torch"] == f"torch {torch.__version__}"
    assert {check["part"] for check in written["checks"]} == {"parity, float32", "parity, far from zero", "uses"}
    assert all(check["is_passed"] for check in written["checks"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert check_gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("checks", "status"),
    [
        ([Check("uses", "a", fail, 1.0), Check("uses", "b", lambda device: 0.5, 1.0)], 1),
        ([Check("parity", "a", lambda device: float("nan"), 1.0), Check("parity", "b", fail, 1.0)], 1),
        ([Check("waits", "a", lambda device: 3, 0)], 1),
        ([Check("speed", "a", fail, 1.6, is_goal=True)], 1),
        ([Check("waits", "a", lambda device: 0, 0), Check("speed", "b", lambda device: 1.0, 1.6, is_goal=True)], 0),
    ],
)
def test_the_status_is_of_what_is_wrong_and_not_of_what_is_slow(checks, status, monkeypatch, capsys):
    monkeypatch.setattr(check_gpu, "list_checks", lambda device, quick: checks)
    assert check_gpu.check_gpu(CPU, quick=True) == status
    table = capsys.readouterr().out
    failures = [check for check in checks if check.measure is fail]
    assert table.count("no such kernel") == len(failures)
    assert all(check.part in table for check in checks)


def test_what_comes_too_late_is_not_run_and_not_wrong(monkeypatch, capsys):
    checks = [Check("parity", "a", fail, 1.0), Check("waits", "b", fail, 0)]
    monkeypatch.setattr(check_gpu, "list_checks", lambda device, quick: checks)
    monkeypatch.setattr(check_gpu, "SECONDS", 0)
    assert check_gpu.check_gpu(CPU, quick=True) == 0
    assert capsys.readouterr().out.count(" not run |") == 2


def test_a_part_that_was_run_in_part_says_so():
    shown = check_gpu.run_checks([Check("parity", "a", lambda device: float("nan"), 1.0)], CPU, seconds=9)
    late = check_gpu.run_checks([Check("parity", "b", fail, 1.0)], CPU, seconds=0)
    table = check_gpu.format_outcomes([*late, *shown])
    assert "worst of 2: a" in table
    assert "0 of 1 right, 1 not run" in table


def test_mistakes_are_told_before_anything_is_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_gpu, "list_checks", fail)
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "gpu.json"):
        assert check_gpu.main(["--device", "cpu", "--json", str(place)]) == 2
        assert f"{str(place)!r}"[:-1].removesuffix("/gpu.json") in capsys.readouterr().err
    for name in ("foo", "meta", "cuda:99"):
        assert check_gpu.main(["--device", name]) == 2
        assert f"got {name!r}" in capsys.readouterr().err


@pytest.mark.slow
def test_everything_is_right_on_a_cpu(capsys):
    assert check_gpu.main(["--device", "cpu"]) == 0
    assert "failed" not in capsys.readouterr().out
