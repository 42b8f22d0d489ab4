import pytest

from bnext.diagnostics.collecting.read_norms import read_norms
from bnext.diagnostics.facts import Facts, TrainingFacts
from tests.diagnostics.checks.configs import RETINANET, describe, examine, list_pairs
from tests.diagnostics.checks.test_small_normalization_batch import make


@pytest.mark.parametrize(
    ("images", "accumulation", "severity"), [(2, 8, "warning"), (8, 2, "warning"), (12, 2, "note"), (16, 8, None)]
)
def test_by_the_size_of_a_micro_batch(images, accumulation, severity):
    facts = Facts(read_norms(make()), training=TrainingFacts(1, images, accumulation))
    found = examine("BN009", facts)

    assert [evidence.severity for evidence in found] == ([severity] if severity else [])
    assert all(evidence.numbers["images_per_step"] == images * accumulation for evidence in found)


def test_a_small_batch_without_accumulation_is_another_check():
    assert not examine("BN009", Facts(read_norms(make()), training=TrainingFacts(1, 2)))
    assert not examine("BN009", Facts(read_norms(make()), training=TrainingFacts(1, None, 8)))


@pytest.mark.parametrize("workers", [1, 2])
def test_its_keys_mend_a_config(workers):
    opts = ("SOLVER.IMS_PER_BATCH", 16 * workers * workers, "SOLVER.BNEXT.ACCUMULATE", 2 * workers)
    (evidence,) = examine("BN009", describe(RETINANET, *opts, num_workers=workers))

    mended = describe(RETINANET, *opts, *list_pairs(evidence.remedy), num_workers=workers)
    assert not examine("BN009", mended)
