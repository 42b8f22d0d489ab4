import pytest

from bnext.diagnostics.registry import find_checks


@pytest.mark.slow  # imports of two libraries of models
def test_every_check_has_a_planted_fault():
    pytest.importorskip("timm")
    import bench.doctor.planted_in_training  # noqa: F401
    from bench.doctor.case import PATIENTS

    assert {patient.code for patient in PATIENTS} == set(find_checks())
