"""What is refused of a re-estimation, and what is repaired: then nothing is written."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from bnext.cli.reestimate import (
    RecomputeRequest,
    _write,
    find_file_faults,
    find_output_faults,
    give_population,
)
from bnext.cli.reestimate import run_request as run
from bnext.errors import CheckpointError, ConfigError, DatasetError, LaunchError, StatisticsError
from bnext.evaluation.reestimate import check_repaired
from bnext.statistics import PopulationEstimate, RecomputeReport
from tests import tiny
from tests.saved import NODE, buffers_that_differ, load, save

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


def test_a_failure_writes_nothing(weights, tmp_path):
    state = torch.load(weights)["model"]
    state["backbone.bottom_up.res3.0.conv1.weight"][0] = 3e38
    torch.save({"model": state}, tmp_path / "huge.pth")
    with pytest.raises(StatisticsError, match=r"finite; got .*res3\.0\.conv1\.norm.*batch 1"):
        run(load(tmp_path / "huge.pth"), RecomputeRequest(output=str(tmp_path / "out.pth")))
    assert [path.name for path in tmp_path.iterdir()] == ["huge.pth"]


def test_models_without_batch_norm_and_foreign_checkpoints(weights, tmp_path):
    no_bn = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RETINANET.NORM", "GN")
    none = ("MODEL.BNEXT.RETINANET.STATISTICS", "per_level", "MODEL.BNEXT.RETINANET.POPULATION", "per_level")
    none += ("MODEL.BNEXT.RETINANET.AFFINE", "shared")
    own = save(tmp_path / "gn.pth", tiny.CONFIG, *no_bn, *none)
    request = RecomputeRequest(output=str(tmp_path / "out.pth"))
    with pytest.raises(StatisticsError, match="must have a batch norm"):
        run(load(own, *no_bn, *none), request)
    with pytest.raises(CheckpointError, match="every parameter and norm statistic"):
        run(load(own), request)
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(CheckpointError, match=r"whole file|state dict"):
        run(load(tmp_path / "text.pth"), request)
    for path, message in (("absent.pth", "absent.pth"), ("", "must name")):
        with pytest.raises(CheckpointError, match=message):
            run(load(tmp_path / path if path else ""), request)
    assert not list(tmp_path.glob("out*"))


def test_statistics_that_are_not_finite_are_repaired_unless_they_count(weights, tmp_path, bnext_log):
    """facebookresearch/detectron2#2413: a checkpoint with such statistics is the one that wants a re-estimation."""
    state = torch.load(weights)
    state["model"]["backbone.bottom_up.res3.0.conv1.norm.running_var"][0] = -1.0
    state["model"]["head.cls_subnet.1.running_mean"][3] = float("nan")
    torch.save(state, tmp_path / "broken.pth")
    run(load(weights), RecomputeRequest(output=str(tmp_path / "whole_out.pth")))
    run(load(tmp_path / "broken.pth"), RecomputeRequest(output=str(tmp_path / "out.pth")))
    stored = [torch.load(tmp_path / name)["model"] for name in ("whole_out.pth", "out.pth")]
    assert not buffers_that_differ(*stored)
    assert "not finite, to be estimated anew: backbone.bottom_up.res3.0.conv1.norm, head.cls_subnet" in bnext_log.text
    for request in (
        RecomputeRequest(output=str(tmp_path / "blend.pth"), source_samples=1),
        RecomputeRequest(output=str(tmp_path / "blend.pth"), source_samples=1, population="per_level"),
    ):
        with pytest.raises(CheckpointError, match=r"running_var must be 0 or more and finite; got -1"):
            run(load(tmp_path / "broken.pth"), request)
    assert not list(tmp_path.glob("blend*"))
    with pytest.raises(CheckpointError, match="running_var must be 0 or more"):  # which begins with them
        run(
            load(tmp_path / "broken.pth", f"{NODE}.ESTIMATOR", "moving_average"),
            RecomputeRequest(output=str(tmp_path / "moving.pth")),
        )


def test_statistics_that_are_not_finite_and_not_reached_are_not_written():
    estimates = (PopulationEstimate("a.norm", (), 0), PopulationEstimate("b", ("p3",), 5))
    with pytest.raises(StatisticsError, match=r"must be reached by the images; got none for a\.norm in 4 images"):
        check_repaired(["a.norm"], RecomputeReport(estimates, 1, 4))
    check_repaired(["b.p3"], RecomputeReport(estimates, 1, 4))


def test_outputs_that_are_refused(weights, tmp_path):
    (tmp_path / "taken.pth").touch()
    (tmp_path / "reported.json").touch()
    (tmp_path / "folder.pth").mkdir()
    os.symlink(weights, tmp_path / "link.pth")
    os.link(weights, tmp_path / "hard.pth")
    cases = {
        "taken.pth": "must not exist",
        "reported.pth": "reported.json",
        "folder.pth": "folder.pth",
        "link.pth": "another file than MODEL.WEIGHTS",
        "hard.pth": "another file than MODEL.WEIGHTS",
        "absent/out.pth": "folder that exists",
        "out.pkl": r"end in \.pth",
    }
    for name, message in cases.items():
        overwrite = name in ("folder.pth", "link.pth", "hard.pth")
        with pytest.raises(ConfigError, match=message):
            run(load(weights), RecomputeRequest(output=str(tmp_path / name), overwrite=overwrite))
    (folder,) = find_output_faults(RecomputeRequest(output=str(tmp_path / "folder.pth")))
    assert "--overwrite" not in str(folder)  # it would not help

    run(load(weights), RecomputeRequest(output=str(tmp_path / "taken.pth"), overwrite=True))
    assert (tmp_path / "taken.pth").stat().st_size > 0


def test_requests_that_are_refused(weights, tmp_path):
    output = str(tmp_path / "out.pth")
    cases = [
        ({"population": "per_image"}, ConfigError, "'shared', 'per_level', 'per_domain'"),
        ({"datasets": ("digits_vall",)}, DatasetError, "nearest: digits_val"),
        ({"datasets": ("digits_val",), "domains": ("a", "b")}, ConfigError, "--domain"),
        ({"num_samples": 0}, ConfigError, "--num-samples"),
        ({"source_samples": -1.0}, StatisticsError, "source_samples"),
        ({"population": "per_domain"}, ConfigError, "--population per_domain must be given the domain"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(load(weights), RecomputeRequest(output=output, **arguments))
    names = ("MODEL.BNEXT.RESNETS.POPULATION", "per_domain", "MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night')")
    with pytest.raises(ConfigError, match=r"--domain must name the domain.*one of \('day', 'night'\).*'digits_train'"):
        run(load(weights, *names), RecomputeRequest(output=output))
    elsewhere = ("DATASETS.DOMAINS.TRAIN", "('dusk',)")
    with pytest.raises(ConfigError, match=r"--domain must name the domain.*got 12 images of 'dusk'"):
        run(load(weights, *names, *elsewhere), RecomputeRequest(output=output))
    with pytest.raises(ConfigError, match="got 'dusk'"):
        run(load(weights, *names), RecomputeRequest(output=output, datasets=("digits_val",), domains=("dusk",)))
    with pytest.raises(ConfigError, match="--population"):
        give_population(tiny.load(tmp_path, config=tiny.RCNN), "per_level")
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def data_set(digits):
    """Registers a function as a data set for the time of a test."""

    def register(function):
        DatasetCatalog.register("digits_odd", function)
        return ("digits_odd",)

    yield register
    DatasetCatalog.remove("digits_odd")
    MetadataCatalog.pop("digits_odd", None)


def divide_by_zero():
    return [1 / 0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: [], "'digits_odd' must have an image"),
        (divide_by_zero, "'digits_odd' must be readable; got ZeroDivisionError"),
        (lambda: {"a.png": {"image_id": 1}}, "must be a list of records, a dict for each image; got .* type str"),
        (lambda: {1: {"image_id": 1}}, "'digits_odd' must be a list of records.*int"),
    ],
    ids=["empty", "error", "dict", "dict of numbers"],
)
def test_a_data_set_that_is_no_list_of_records_is_refused(weights, tmp_path, data_set, function, message):
    with pytest.raises(DatasetError, match=message):
        run(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=data_set(function)))


def test_records_that_the_mapper_cannot_read_are_named(weights, tmp_path, data_set):
    thin, wrong = tmp_path / "thin.png", {"image_id": 7, "file_name": "/nowhere/1.png"}
    Image.new("RGB", (3000, 1)).save(thin)
    cases = [
        ({"image_id": 5, "height": 1, "width": 3000, "file_name": str(thin)}, r"ValueError.*\(.*thin\.png, 3000 x 1\)"),
        ({"image_id": 6}, r"KeyError: 'file_name' \(image_id 6\)"),
        ({"image_id": 6, "file_name": None}, r"TypeError.*\(image_id 6\)"),
        (wrong, r".*No such file.*/nowhere/1\.png"),
    ]
    records = []
    datasets = data_set(lambda: records)
    for record, message in cases:
        records[:] = [record] * 4
        with pytest.raises(DatasetError, match=message):
            run(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=datasets))


def test_weights_with_a_query_are_the_file_before_it(weights, tmp_path):
    """As train_net has it. Detectron2 0.6 reads no query, later versions do."""
    address, request = f"{weights}?matching_heuristics=True", RecomputeRequest(output=str(tmp_path / "out.pth"))
    assert not list(find_file_faults(address, request))
    (same,) = find_file_faults(address, RecomputeRequest(output=str(weights), overwrite=True))
    assert "another file than MODEL.WEIGHTS" in str(same)
    (absent,) = find_file_faults(f"{tmp_path / 'absent.pth'}?x=1", request)
    assert "does not exist" in str(absent)
    try:
        run(load(address), request)
    except CheckpointError as error:
        assert "Leave out what follows '?'" in str(error)  # noqa: PT017  either is right
    else:
        assert Path(request.output).is_file()


def test_a_data_set_counts_once_for_a_domain(weights, tmp_path):
    output, cfg = str(tmp_path / "out.pth"), load(weights)
    twice = ("digits_val", "digits_val")
    with pytest.raises(ConfigError, match="--dataset must name each.*'digits_val' twice for --domain day"):
        run(cfg, RecomputeRequest(output=output, datasets=twice, domains=("day", "day")))
    with pytest.raises(ConfigError, match="--dataset must name each.*'digits_val' twice"):
        run(cfg, RecomputeRequest(output=output, datasets=twice))
    run(cfg, RecomputeRequest(output=output, datasets=twice, domains=("day", "night"), population="per_domain"))


# ---- what is written


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("file", ["out.pth", "out.json"])
def test_without_room_for_both_files_there_is_none(tmp_path, file):
    """Also for a few bytes, which wait in a buffer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    described = {"long": "x" * 20_000} if file == "out.json" else {}
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if described else 10, before[1]))
    try:
        with pytest.raises(LaunchError, match=r"--output must be on a disk with room.*too large.*nothing is written"):
            _write(RecomputeRequest(output=str(tmp_path / "out.pth")), {}, described)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_what_ended_workers_have_half_written_is_removed(weights, tmp_path, monkeypatch):
    """Workers are ended by a signal, which no `finally` of theirs sees."""

    def start(main, number, args, device):
        for name in ("out.pth.1-0.partial", "out.json.1-0.partial", "other.pth.1-0.partial"):
            (tmp_path / name).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("bnext.cli.reestimate.launch", start)
    with pytest.raises(KeyboardInterrupt):
        run(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth")))
    assert [path.name for path in tmp_path.iterdir()] == ["other.pth.1-0.partial"]
