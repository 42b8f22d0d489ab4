"""The study of population statistics: what is trained, read, re-estimated and written, and what is refused."""

import contextlib
import io
import json

import pytest
import torch
from population_study import SAMPLES, SIZES, load_rows, run_rows
from population_tables import draw_results, format_tables

from bnext.config import load_config
from bnext.config.recipe import read_place
from bnext.errors import ConfigError
from bnext.layers import NormSpec
from tests.markdown import read_tables
from tests.tiny import ROOT

CONFIGS = ROOT / "projects/PopulationStatistics/configs"
TINY = ["SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.IMS_PER_BATCH", "4"]
TINY += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "TEST.PRECISE_BN.NUM_ITER", "2"]
TINY += ["MODEL.RETINANET.NUM_CONVS", "1", "MODEL.FPN.OUT_CHANNELS", "16"]


def load(sizes, output, *opts, parts=("training", "nbs"), samples=(4, 8)):
    files = {size: str(CONFIGS / f"nbs_{size}.yaml") for size in sizes}
    return load_rows(files, str(output), parts, samples, [*TINY, *opts])


def change(cfg, **solver):
    cfg = cfg.clone()
    cfg.defrost()
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


def results_of(**changes):
    """Results as of a study of one size and two checkpoints."""
    reading = {"normalization_batch_size": 2, "generalization_gap": 0.25, "inconsistency": -0.125}
    ways = ("mini_batch_train", "mini_batch_val", "population_val", "moving_average")
    reading |= {f"{way}_loss": 1 + number / 8 for number, way in enumerate(ways)}
    reading |= {"population_val_AP": 33.31, "mini_batch_val_AP": 22.22, **changes}
    rows = {"nbs_2": {"bbox/AP": 11.11, **{f"reading/{key}": value for key, value in reading.items()}}}
    for iteration in (100, 50):
        row = rows[f"iteration_{iteration}"] = {}
        for kind, value in (("moving_average", 0.0), ("samples_32", 3.2), ("samples_8", 0.8)):
            row |= {f"{kind}/AP": value + iteration, f"{kind}/loss": value + iteration}
    return {"rows": rows, "seconds": {}}


@pytest.mark.parametrize("size", SIZES)
def test_configs_are_what_their_rows_claim(size):
    cfg = load_config(str(CONFIGS / f"nbs_{size}.yaml"), ["MODEL.DEVICE", "cpu"])
    shared = NormSpec(normalization_batch_size=size)
    assert read_place(cfg, "RESNETS").norm == shared
    assert read_place(cfg, "RETINANET").norm == NormSpec.from_table5_row(4).replace(normalization_batch_size=size)
    assert SAMPLES[-1] == cfg.TEST.PRECISE_BN.NUM_ITER * cfg.SOLVER.IMS_PER_BATCH
    assert not any(number % cfg.SOLVER.IMS_PER_BATCH for number in SAMPLES)


@pytest.fixture(scope="module")
def study(digits, tmp_path_factory):
    """A study of one size and two checkpoints: its folder, configs, results and what it has printed."""
    output = tmp_path_factory.mktemp("study")
    configs = load([2], output)
    assert list(configs) == ["nbs_2", "iteration_1", "iteration_2", "iteration_4", "iteration_8"]
    chosen = {row: configs[row] for row in ("nbs_2", "iteration_4", "iteration_8")}
    chosen["nbs_2"] = change(chosen["nbs_2"], CHECKPOINT_PERIOD=4)  # fewer files
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_rows(chosen, str(output), "digits", samples=(4, 8))
    return output, chosen, json.loads((output / "results.json").read_text()), printed.getvalue()


def test_a_training_is_read_in_three_ways(study):
    output, _, results, printed = study
    reading = results["rows"]["nbs_2"]
    ways = ("mini_batch_train", "mini_batch_val", "population_val")
    train, val, population = (reading[f"reading/{way}_loss"] for way in ways)
    assert val - train == pytest.approx(reading["reading/generalization_gap"])
    assert population - val == pytest.approx(reading["reading/inconsistency"])
    assert {"reading/population_val_AP", "reading/mini_batch_val_AP", "bbox/AP"} <= set(reading)
    assert "NBS 2" in printed
    state = torch.load(output / "nbs_2/model_final.pth", weights_only=False)["model"]
    assert int(state["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"]) == 8, "the file is as it was trained"


def test_checkpoints_have_their_own_losses_and_statistics(study):
    output, _, results, _ = study
    reading, half, end = results["rows"].values()
    # The same statistics, reached in two ways: two batches of 4 images.
    assert end["samples_8/loss"] == pytest.approx(reading["reading/population_val_loss"])
    assert end["moving_average/loss"] == pytest.approx(reading["reading/moving_average_loss"])
    assert len({end[f"{kind}/loss"] for kind in ("moving_average", "samples_4", "samples_8")}) == 3
    assert half["moving_average/loss"] != end["moving_average/loss"]
    assert (end["samples_4/samples"], end["samples_8/samples"]) == (4, 8)
    assert end["samples_4/standard_error"] is None, "one batch has no error"
    assert end["samples_8/standard_error"] > 0
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert {"train_and_evaluate_row_nbs_2", "read_row_nbs_2", "evaluate_row_iteration_8"} <= set(results["seconds"])


def test_a_diverged_loss_is_null(study, tmp_path):
    output, configs, _, _ = study
    file = torch.load(output / "nbs_2/model_0000007.pth", weights_only=False)
    file["model"]["head.cls_score.weight"].fill_(3e38)  # NaN itself is refused
    cfg = change(configs["iteration_8"])
    cfg.OUTPUT_DIR = str(tmp_path)
    torch.save(file, tmp_path / "model_0000007.pth")
    run_rows({"iteration_8": cfg}, str(tmp_path), "digits", samples=(4,))
    row = json.loads((tmp_path / "results.json").read_text())["rows"]["iteration_8"]
    assert row["samples_4/loss"] is None


def test_parts_choose_the_trainings(digits, tmp_path):
    assert list(load([4, 2], tmp_path, parts=["nbs"])) == ["nbs_4", "nbs_2"]
    assert list(load([4, 2], tmp_path, parts=["training"]))[:2] == ["nbs_4", "iteration_1"]


def read_lines(text):
    """The rows of all tables, a space between cells."""
    lines = []
    for rows in read_tables(text):
        lines += [" ".join(filter(None, row)) for row in rows]
    return lines


def test_tables_show_ours_beside_the_papers():
    lines = read_lines(format_tables(results_of(), "digits"))
    assert "50 AP 50.0 50.8 53.2" in lines
    assert lines.index("50 AP 50.0 50.8 53.2") < lines.index("100 AP 100.0 100.8 103.2")
    assert "loss 50.000 50.800 53.200" in lines
    assert "batch 8192, epoch 30 52.8 45.5 40.1 39.44 39.42" in lines
    assert "mini-batch, training images 1.000 - 16.5" in lines
    assert "mini-batch, validation images 1.125 22.2 26.0" in lines
    assert "population, validation images 1.250 33.3 32.5" in lines
    assert "moving average, validation images 1.375 11.1 n.r." in lines
    assert "generalization gap +0.250" in lines
    assert "train-test inconsistency -0.125" in lines


def test_a_loss_that_is_not_finite_is_shown_and_drawn_as_none(tmp_path):
    results = results_of(population_val_loss=None)
    results["rows"]["iteration_50"]["samples_8/loss"] = None
    assert "population, validation images -" in "\n".join(read_lines(format_tables(results, "digits")))
    assert draw_results(results, tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("samples", [(0,), (6,), (16,)])
def test_samples_are_whole_batches_of_the_training_images(digits, tmp_path, samples):
    with pytest.raises(ConfigError, match="--samples"):
        load([2], tmp_path, samples=samples)


def test_checkpoints_must_lie_at_eighths(digits, tmp_path):
    with pytest.raises(ConfigError, match="SOLVER.MAX_ITER"):
        load([2], tmp_path, "SOLVER.CHECKPOINT_PERIOD", "2")
    load([2], tmp_path, "SOLVER.CHECKPOINT_PERIOD", "2", parts=["nbs"])


def test_pairs_do_not_turn_a_row_into_another(digits, tmp_path):
    with pytest.raises(ConfigError, match="RETINANET.NORMALIZATION_BATCH_SIZE"):
        load([2], tmp_path, "MODEL.BNEXT.RETINANET.NORMALIZATION_BATCH_SIZE", "4")
    with pytest.raises(ConfigError, match="RESNETS"):
        load([2], tmp_path, "MODEL.RESNETS.NORM", "GN", "MODEL.BNEXT.RESNETS.NORMALIZATION_BATCH_SIZE", "0")
    with pytest.raises(ConfigError, match="IMS_PER_BATCH"):
        load([8], tmp_path)
