"""The images of a re-estimation of a checkpoint: in which batches, and of which domain."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.cli.reestimate import run_request as run
from bnext.cli.reestimate_request import RecomputeRequest
from bnext.errors import StatisticsError
from bnext.evaluation.reestimate import build_batches
from tests.saved import NODE, load

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


@pytest.fixture
def further(digits):
    """A second data set of a domain."""
    DatasetCatalog.register("digits_further", lambda: DatasetCatalog.get("digits_train"))
    yield "digits_further"
    DatasetCatalog.remove("digits_further")
    MetadataCatalog.pop("digits_further", None)


def test_batches_are_of_one_data_set_in_an_order_that_is_always_the_same(weights):
    cfg = load(weights, "SOLVER.IMS_PER_BATCH", 8)
    loader = build_batches(cfg, ["digits_train", "digits_val"], domains=["a", "b"])
    batches = [[record["file_name"] for record in batch] for batch in loader]
    assert [len(batch) for batch in batches] == [6, 4, 6]
    assert all("/val/" in name for name in batches[1])
    assert sorted(batches[0] + batches[2]) == sorted(r["file_name"] for r in DatasetCatalog.get("digits_train"))
    again = build_batches(cfg, ["digits_train", "digits_val"], domains=["a", "b"])
    assert batches == [[record["file_name"] for record in batch] for batch in again]
    assert batches[0] != sorted(batches[0])


@pytest.mark.parametrize(("size", "sizes"), [(4, [4, 4, 4]), (11, [6, 6]), (5, [4, 4, 4]), (100, [12])])
def test_batches_are_nearly_equal_and_the_last_is_no_single_image(weights, size, sizes):
    batches = list(build_batches(load(weights, "SOLVER.IMS_PER_BATCH", size), ["digits_train"]))
    assert [len(batch) for batch in batches] == sizes
    assert len({record["image_id"] for batch in batches for record in batch}) == 12


def test_batches_of_several_data_sets_alternate_in_proportion(weights):
    loader = build_batches(load(weights, "SOLVER.IMS_PER_BATCH", 2), ["digits_train", "digits_val"])
    sets = ["val" if "/val/" in batch[0]["file_name"] else "train" for batch in loader]
    assert sets == ["train", "val", "train", "train", "train", "val", "train", "train"]


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


def test_a_domain_that_was_asked_for_and_gets_no_image_is_refused(weights, unlabelled, tmp_path, monkeypatch):
    monkeypatch.setattr("bnext.statistics.kept_state._PERIOD", 1)
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
