"""The images of a re-estimation of a checkpoint: how many of which domain."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.cli.reestimate import RecomputeRequest
from bnext.cli.reestimate import run_request as run
from bnext.errors import StatisticsError
from tests.saved import NODE, load

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


@pytest.fixture
def further(digits):
    """A second data set of a domain."""
    DatasetCatalog.register("digits_further", lambda: DatasetCatalog.get("digits_train"))
    yield "digits_further"
    DatasetCatalog.remove("digits_further")
    MetadataCatalog.pop("digits_further", None)


@pytest.mark.parametrize(("num_samples", "tolerance", "night", "day"), [(10, 0.0, 2, 8), (None, 5.0, 4, 20)])
def test_whoever_stops_early_has_seen_every_domain(
    weights, unlabelled, further, tmp_path, num_samples, tolerance, night, day
):
    request = RecomputeRequest(
        output=str(tmp_path / "out.pth"),
        population="per_domain",
        datasets=("digits_train", further, unlabelled),
        domains=("day", "day", "night"),
        num_samples=num_samples,
    )
    run(load(weights, "SOLVER.IMS_PER_BATCH", 2, f"{NODE}.TOLERANCE", tolerance), request)
    report = json.loads((tmp_path / "out.json").read_text())["report"]
    samples = {tuple(row["levels"]): row["num_samples"] for row in report["estimates"]}
    assert (samples["night",], samples["day",]) == (night, day)


def test_a_domain_that_was_asked_for_and_gets_no_image_is_refused(weights, unlabelled, tmp_path):
    request = RecomputeRequest(
        output=str(tmp_path / "out.pth"),
        population="per_domain",
        datasets=("digits_train", unlabelled),
        domains=("day", "night"),
        num_samples=1,
    )
    with pytest.raises(StatisticsError, match=r"--domain must get images; got none for 'night'.*digits_unlabelled"):
        run(load(weights), request)
    assert not list(tmp_path.iterdir())
