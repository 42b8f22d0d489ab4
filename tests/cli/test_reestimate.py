"""Statistics of a saved checkpoint: the output is what a re-estimation in memory gives, and nothing else changes."""

import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from bnext.checkpoints import Checkpointer
from bnext.cli.reestimate import RecomputeRequest, recompute_checkpoint
from bnext.cli.reestimate import run_request as run
from bnext.errors import ConfigError
from bnext.evaluation.reestimate import format_report, recompute_statistics
from bnext.layers import LevelBatchNorm2d
from bnext.statistics import PopulationEstimate, RecomputeReport
from tests import tiny
from tests.markdown import read_tables
from tests.saved import NODE, buffers_that_differ, load, save

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


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
    counters = {key: int(stored["model"][key]) for key in changed if key.endswith("num_batches_tracked")}
    assert len(counters) == len(report.estimates)
    assert set(counters.values()) == {2}
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
    assert samples.keys() == {("day",), ("night",)}, "in the head as well"
    state = torch.load(tmp_path / "out.pth")["model"]
    night = {key: value for key, value in state.items() if ".night.running_mean" in key}
    assert night
    assert all(not torch.equal(value, state[key.replace(".night.", ".day.")]) for key, value in night.items())


def test_each_set_is_of_its_own_domain_unless_the_request_says_another(weights, unlabelled, tmp_path):
    said = ("DATASETS.DOMAINS.TRAIN", "('day',)", "DATASETS.TEST", f"('{unlabelled}',)")
    said += ("DATASETS.DOMAINS.TEST", "('night',)")
    per_domain = {"population": "per_domain", "datasets": ("digits_train", unlabelled)}

    def count(name, *opts, **request):
        run(load(weights, *said, *opts), RecomputeRequest(output=str(tmp_path / f"{name}.pth"), **request))
        report = json.loads((tmp_path / f"{name}.json").read_text())
        counts = {tuple(row["levels"]): row["num_samples"] for row in report["report"]["estimates"]}
        return report["keys"]["MODEL.BNEXT.DOMAINS.NAMES"], {k[0]: n for k, n in counts.items() if len(k) == 1}

    assert count("own", **per_domain) == (["day", "night"], {"day": 12, "night": 4})
    assert count("given", **per_domain, domains=("night", "day")) == (["day", "night"], {"day": 4, "night": 12})
    assert count("train", population="per_domain") == (["day"], {"day": 8})


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


def test_the_table_says_what_was_not_reached_and_not_converged():
    estimates = (
        PopulationEstimate("a", (), 1000, 10, 5, 0.5, 2.0, 0.004, 0.2),
        PopulationEstimate("b", ("night",), 0),
        PopulationEstimate("c", (), 50, 10, 1),
    )
    text = format_report(RecomputeReport(estimates, 5, 10, 0.01))
    ((_, *rows),) = read_tables(text)
    assert [row[0] for row in rows] == ["b.night", "c", "a"], "the worst come first"
    lines = {row[0]: " ".join(row) for row in rows}
    assert "20 %" in lines["a"]
    assert "not converged" in lines["a"]
    assert "not reached" in lines["b.night"]
    assert "unknown" in lines["c"]


def test_of_sixty_sets_the_five_that_are_known_worst_are_shown():
    estimates = [PopulationEstimate(f"norm{n}", (), 1000, 10, 5, 0.5, 2.0, n / 1000, n / 1000) for n in range(1, 61)]
    missed = [PopulationEstimate(f"missed{n}", (), 0) for n in range(40)]
    text = format_report(RecomputeReport((*estimates, *missed[:2]), 5, 10, 0.01))
    ((_, *rows),) = read_tables(text)
    assert [row[0] for row in rows] == ["missed0", "missed1", "norm60", "norm59", "norm58"]
    assert "5 of 62 sets" in text
    assert len(format_report(RecomputeReport((*estimates, *missed), 5, 10, 0.01)).splitlines()) < 25


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
    with pytest.raises(ConfigError, match="--population"):
        run(load(own, *plain), RecomputeRequest(output=str(tmp_path / "x.pth"), population="shared"))
