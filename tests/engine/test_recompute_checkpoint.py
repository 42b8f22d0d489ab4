"""Statistics of a saved checkpoint: the output is what a re-estimation in memory gives, and nothing else changes."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model

from bnext.engine import Checkpointer
from bnext.engine.recompute import build_batches, format_report, recompute_statistics
from bnext.engine.recompute_checkpoint import _check_repaired, give_population, recompute_checkpoint
from bnext.engine.recompute_checkpoint import run_request as run
from bnext.engine.recompute_request import RecomputeRequest
from bnext.errors import CheckpointError, ConfigError, DatasetError, StatisticsError
from bnext.layers import LevelBatchNorm2d
from bnext.statistics import PopulationEstimate, RecomputeReport
from tests.engine import tiny

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
ON = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2)
NODE = "TEST.BNEXT.PRECISE_BN"


def save(path, config=tiny.CONFIG, *opts):
    """Random weights of a config, saved as a training does."""
    torch.manual_seed(0)
    model = build_model(tiny.load(path.parent, *opts, config=config))
    torch.save({"model": model.state_dict(), "iteration": 5, "optimizer": {"lr": 1.0}, "classes": ["a"]}, path)
    return path


@pytest.fixture(scope="module")
def weights(digits, tmp_path_factory):
    return save(tmp_path_factory.mktemp("weights") / "in.pth")


@pytest.fixture(scope="module")
def unlabelled(digits):
    """The validation images without their labels, as a target data set."""
    records = [{k: v for k, v in r.items() if k != "annotations"} for r in DatasetCatalog.get("digits_val")]
    DatasetCatalog.register("digits_unlabelled", lambda: records)
    yield "digits_unlabelled"
    DatasetCatalog.remove("digits_unlabelled")
    MetadataCatalog.pop("digits_unlabelled", None)


def load(weights, *opts, config=tiny.CONFIG):
    return tiny.load(Path(weights).parent / "unused", *ON, "MODEL.WEIGHTS", weights, *opts, config=config)


def buffers_that_differ(first, second):
    return {key for key in first if key not in second or not torch.equal(first[key], second[key])}


def test_output_is_the_estimate_in_memory_and_the_input_stays(weights, tmp_path, capsys):
    before = weights.read_bytes()
    cfg = load(weights)
    run(cfg, RecomputeRequest(output=str(tmp_path / "out.pth")))
    assert weights.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.pth"]
    assert not (weights.parent / "unused").exists()
    model = build_model(cfg)
    Checkpointer(model).load(str(weights), checkpointables=[])
    report = recompute_statistics(cfg, model)
    stored = torch.load(tmp_path / "out.pth")
    assert not buffers_that_differ(model.state_dict(), stored["model"])
    changed = buffers_that_differ(stored["model"], torch.load(weights)["model"])
    assert {key.rpartition(".")[2] for key in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    assert stored.keys() == {"model", "norm_specs", "classes", "recomputed_statistics"}
    described = json.loads((tmp_path / "out.json").read_text())
    assert described["report"] == json.loads(json.dumps(report.as_dict()))
    assert (described["datasets"], described["num_samples"]) == (["digits_train"], 8)
    printed = capsys.readouterr().out
    assert "standard error" in printed
    assert "out.json" in printed


def test_both_checkpointers_load_the_output(weights, tmp_path):
    cfg = load(weights)
    run(cfg, RecomputeRequest(output=str(tmp_path / "out.pth")))
    for checkpointer in (DetectionCheckpointer, Checkpointer):
        model = build_model(cfg)
        checkpointer(model).load(str(tmp_path / "out.pth"))
        assert not buffers_that_differ(model.state_dict(), torch.load(tmp_path / "out.pth")["model"])


def test_population_per_level_and_the_keys_that_load_it(weights, tmp_path, capsys):
    run(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth"), population="per_level"))
    assert "MODEL.BNEXT.RETINANET.POPULATION: per_level" in capsys.readouterr().out
    keys = json.loads((tmp_path / "out.json").read_text())["keys"]
    pairs = [word for key, value in keys.items() for word in (key, value)]
    model = build_model(load(tmp_path / "out.pth", *pairs))
    Checkpointer(model).load(str(tmp_path / "out.pth"), checkpointables=[], complete=True)
    norm = next(module for module in model.modules() if isinstance(module, LevelBatchNorm2d))
    assert norm.spec.population == "per_level"
    means = [norm.population_state(level).running_mean for level in ("p3", "p5")]
    assert not torch.equal(*means)


def test_population_per_domain_from_a_data_set_each(weights, unlabelled, tmp_path):
    request = RecomputeRequest(
        output=str(tmp_path / "out.pth"),
        population="per_domain",
        datasets=("digits_train", unlabelled),
        domains=("day", "night"),
    )
    run(load(weights), request)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["keys"]["MODEL.BNEXT.DOMAINS.NAMES"] == ["day", "night"]
    samples = {tuple(row["levels"]): row["num_samples"] for row in report["report"]["estimates"]}
    assert (samples["day",], samples["night",]) == (12, 4)
    assert samples["p3", "p4", "p5", "p6", "p7"] == 16
    state = torch.load(tmp_path / "out.pth")["model"]
    night = {key: value for key, value in state.items() if ".night.running_mean" in key}
    assert night
    assert all(not torch.equal(value, state[key.replace(".night.", ".day.")]) for key, value in night.items())


def test_a_domain_without_samples_is_said_and_stays(weights, tmp_path, capsys):
    names = ("MODEL.BNEXT.RESNETS.POPULATION", "per_domain", "MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night')")
    request = RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=("digits_val",), domains=("day",))
    run(load(weights, *names), request)
    assert "not reached" in capsys.readouterr().out
    state = torch.load(tmp_path / "out.pth")["model"]
    assert all(value.eq(0).all() for key, value in state.items() if ".night.running_mean" in key)


def test_a_target_without_labels_and_the_weight_of_the_source(weights, unlabelled, tmp_path):
    old = torch.load(weights)["model"]
    states = []
    for number, source_samples in enumerate((0, 4, 1e9)):
        output = tmp_path / f"{number}.pth"
        request = RecomputeRequest(output=str(output), datasets=(unlabelled,), source_samples=source_samples)
        run(load(weights, f"{NODE}.ESTIMATOR", "pooled"), request)
        states.append(torch.load(output)["model"])
    key = next(key for key in old if key.endswith("running_mean"))
    torch.testing.assert_close(states[1][key], (old[key] + states[0][key]) / 2)
    torch.testing.assert_close(states[2][key], old[key], atol=1e-5, rtol=0)


def test_an_r_cnn_without_labels_needs_the_top_scored_rois(digits, unlabelled, tmp_path):
    weights = save(tmp_path / "in.pth", tiny.RCNN)
    request = RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=(unlabelled,))
    with pytest.raises(ConfigError, match=r"labelled.*'digits_unlabelled'.*ROIS to 'top_scored'"):
        run(load(weights, config=tiny.RCNN), request)
    assert not list(tmp_path.glob("out*"))
    run(load(weights, f"{NODE}.ROIS", "top_scored", config=tiny.RCNN), request)
    assert json.loads((tmp_path / "out.json").read_text())["num_samples"] == 4


def test_an_interrupted_run_goes_on_with_resume(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("bnext.statistics.kept_state._PERIOD", 2)
    cfg = load(weights, "SOLVER.IMS_PER_BATCH", 2)
    whole = RecomputeRequest(output=str(tmp_path / "whole.pth"), datasets=("digits_train",))
    run(cfg, whole)
    request = RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=("digits_train",), resume=True)
    interrupt_at(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, request)
    assert [path.suffix for path in tmp_path.glob("out*")] == [".state"]
    monkeypatch.undo()
    seen = interrupt_at(100, monkeypatch)
    run(cfg, request)
    assert len(seen) == 6 - 4, "four batches were kept"
    assert not list(tmp_path.glob("*.state"))
    first, second = (torch.load(tmp_path / name)["model"] for name in ("whole.pth", "out.pth"))
    assert not buffers_that_differ(first, second)


def interrupt_at(number, monkeypatch):
    """Ctrl-C in a forward; gives the list of forwards."""
    from bnext.engine import recompute

    choose, seen = recompute.choose_forward, []

    def chosen(*args):
        forward = choose(*args)

        def counted(model, batch):
            seen.append(1)
            if len(seen) == number:
                raise KeyboardInterrupt
            return forward(model, batch)

        return counted

    monkeypatch.setattr(recompute, "choose_forward", chosen)
    return seen


def keep(tmp_path, cfg, monkeypatch, resume=False, **arguments):
    """A run that is interrupted after it has kept something."""
    request = RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=("digits_train",), resume=resume, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr("bnext.statistics.kept_state._PERIOD", 2)
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt, match="The same command with --resume goes on"):
            run(cfg, request)
    (path,) = tmp_path.glob("out*.state")
    return request, path


def test_without_resume_what_was_kept_goes_when_the_new_run_has_begun(weights, tmp_path, monkeypatch, bnext_log):
    cfg = load(weights, "SOLVER.IMS_PER_BATCH", 2)
    request, first = keep(tmp_path, cfg, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(DatasetMapper, "__call__", lambda *args: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(DatasetError, match="gone"):
            run(cfg, request)
    with monkeypatch.context() as patch:
        patch.setattr("bnext.engine.kept_run._remove", lambda paths: pytest.fail("not before the first batch"))
        patch.setattr("bnext.engine.recompute.recompute_population_statistics", interrupt)
        with pytest.raises(KeyboardInterrupt, match="goes on"):
            run(cfg, request)
    assert first.exists()
    assert "removed" not in bnext_log.text
    _, second = keep(tmp_path, cfg, monkeypatch)
    assert second != first
    assert f"{first.name} of an earlier run removed" in bnext_log.text
    seen = interrupt_at(100, monkeypatch)
    run(cfg, dataclasses.replace(request, resume=True))
    assert len(seen) == 2, "goes on with the second one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.pth"]


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_interruption_before_anything_is_kept_promises_nothing(weights, tmp_path, monkeypatch):
    interrupt_at(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth")))
    assert str(caught.value) == ""


def test_what_other_outputs_have_kept_stays(weights, tmp_path):
    others = ["o1.pth.0123456789ab.1.state", "o[1].pth.x.pth.0123456789ab.1.state", "o[1].pth.notes.state"]
    own = ["o[1].pth.0123456789ab.1.state", "o[1].pth.0123456789ab.2.state.1"]
    for name in [*others, *own]:
        (tmp_path / name).write_text("kept")
    run(load(weights), RecomputeRequest(output=str(tmp_path / "o[1].pth")))
    assert {path.name for path in tmp_path.iterdir()} == {*others, "o[1].pth", "o[1].json"}


def test_enough_images_and_fewer_than_asked(weights, tmp_path, capsys):
    run(load(weights), RecomputeRequest(output=str(tmp_path / "few.pth"), num_samples=5))
    assert json.loads((tmp_path / "few.json").read_text())["num_samples"] == 8, "the batch that reaches it"
    assert "Fewer" not in capsys.readouterr().out
    for datasets, number in (((), 12), (("digits_val",), 4)):
        output = str(tmp_path / f"all{number}.pth")
        run(load(weights), RecomputeRequest(output=output, num_samples=1000, datasets=datasets))
        assert f"Fewer images than asked: {number} of 1000" in capsys.readouterr().out


def test_layer_by_layer_and_tolerance_come_from_the_config(weights, tmp_path):
    run(load(weights, f"{NODE}.ESTIMATOR", "layer_by_layer"), RecomputeRequest(output=str(tmp_path / "exact.pth")))
    assert json.loads((tmp_path / "exact.json").read_text())["estimator"] == "layer_by_layer"
    run(load(weights, f"{NODE}.TOLERANCE", 1e-9), RecomputeRequest(output=str(tmp_path / "out.pth")))
    assert json.loads((tmp_path / "out.json").read_text())["report"]["tolerance"] == 1e-9


def test_a_failure_writes_nothing(weights, tmp_path):
    state = torch.load(weights)["model"]
    state["backbone.bottom_up.res3.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save({"model": state}, tmp_path / "nan.pth")
    with pytest.raises(StatisticsError, match=r"finite; got NaN.*res3\.0\.conv1\.norm.*batch 1"):
        run(load(tmp_path / "nan.pth"), RecomputeRequest(output=str(tmp_path / "out.pth")))
    assert [path.name for path in tmp_path.iterdir()] == ["nan.pth"]


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


def test_statistics_that_are_not_finite_and_not_reached_are_not_written(weights, tmp_path):
    estimates = (PopulationEstimate("a.norm", (), 0), PopulationEstimate("b", ("p3",), 5))
    with pytest.raises(StatisticsError, match=r"must be reached by the images; got none for a\.norm in 4 images"):
        _check_repaired(["a.norm"], RecomputeReport(estimates, 1, 4))
    _check_repaired(["b.p3"], RecomputeReport(estimates, 1, 4))


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
        ({"population": "per_domain"}, ConfigError, "domains must name the domains"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(load(weights), RecomputeRequest(output=output, **arguments))
    with pytest.raises(ConfigError, match=r"--resume must be.*'layer_by_layer'"):
        run(load(weights, f"{NODE}.ESTIMATOR", "layer_by_layer"), RecomputeRequest(output=output, resume=True))
    names = ("MODEL.BNEXT.RESNETS.POPULATION", "per_domain", "MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night')")
    with pytest.raises(ConfigError, match=r"--domain must name the domain.*got none of \('day', 'night'\)"):
        run(load(weights, *names), RecomputeRequest(output=output))
    with pytest.raises(ConfigError, match="got 'dusk'"):
        run(load(weights, *names), RecomputeRequest(output=output, datasets=("digits_val",), domains=("dusk",)))
    with pytest.raises(ConfigError, match="architecture of bnext"):
        give_population(tiny.load(tmp_path, config=tiny.RCNN), "per_level")
    assert not list(tmp_path.glob("out*"))


def test_an_empty_data_set_is_refused(weights, tmp_path):
    DatasetCatalog.register("digits_empty", lambda: [])
    try:
        with pytest.raises(DatasetError, match="'digits_empty' must be readable and have an image"):
            run(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=("digits_empty",)))
    finally:
        DatasetCatalog.remove("digits_empty")


def test_an_image_that_is_gone_is_named(weights, tmp_path, digits):
    records = [{**record, "file_name": "/nowhere/1.png"} for record in DatasetCatalog.get("digits_val")]
    DatasetCatalog.register("digits_gone", lambda: records)
    try:
        with pytest.raises(DatasetError, match=r"/nowhere/1\.png"):
            run(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=("digits_gone",)))
    finally:
        DatasetCatalog.remove("digits_gone")


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
def test_whoever_stops_early_has_seen_every_domain(weights, unlabelled, tmp_path, num_samples, tolerance, night, day):
    request = RecomputeRequest(
        output=str(tmp_path / "out.pth"),
        population="per_domain",
        datasets=("digits_train", "digits_train", unlabelled),
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


def test_the_table_says_what_was_not_reached_and_not_converged():
    estimates = (
        PopulationEstimate("a", (), 1000, 10, 5, 0.5, 2.0, 0.004, 0.2),
        PopulationEstimate("b", ("night",), 0),
        PopulationEstimate("c", (), 50, 10, 1),
    )
    text = format_report(RecomputeReport(estimates, 5, 10, 0.01))
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith(("a ", "b.night", "c "))}
    assert "20 %" in lines["a"]
    assert "not converged" in lines["a"]
    assert "not reached" in lines["b.night"]
    assert "unknown" in lines["c"]


def test_what_every_worker_does_returns_the_report(weights, tmp_path):
    report = recompute_checkpoint(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth")))
    assert report.num_batches == 2


def test_a_model_of_detectron2_alone(digits, tmp_path):
    """Its architecture, its norms: torch's, in a head once for each level."""
    plain = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BNEXT.RETINANET.POPULATION", "per_level")
    plain += ("MODEL.BNEXT.RETINANET.AFFINE", "shared")
    own = save(tmp_path / "in.pth", tiny.CONFIG, *plain)
    run(load(own, *plain), RecomputeRequest(output=str(tmp_path / "out.pth")))
    old, new = torch.load(own)["model"], torch.load(tmp_path / "out.pth")["model"]
    assert old.keys() == new.keys()
    changed = {key for key in buffers_that_differ(old, new) if key.endswith("running_var")}
    assert changed == {key for key in old if key.endswith("running_var")}
    with pytest.raises(ConfigError, match="BNextRetinaNet, which loads the same checkpoint"):
        run(load(own, *plain), RecomputeRequest(output=str(tmp_path / "x.pth"), population="per_level"))
