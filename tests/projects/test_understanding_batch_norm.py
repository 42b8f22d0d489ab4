"""The study after Bjorck et al.: what it refuses, and its effects in a quick form."""

import pytest
from run_understanding import main
from understanding_setting import UnderstandingSetting, build_model
from understanding_trials import list_trials

from bnext.errors import ConfigError
from bnext.studies.results_file import read_results
from bnext.studies.trials import collect
from tests.tiny import ROOT


@pytest.mark.parametrize("wrong", [{"initialization": "zeros"}, {"rates": (0.0,)}, {"epochs": 0}])
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        UnderstandingSetting(**wrong)


def test_a_depth_without_whole_blocks_is_refused():
    with pytest.raises(ConfigError, match="depth"):
        build_model(UnderstandingSetting(depth=57), norm=True, seed=1)


def test_both_nets_have_the_weights_of_the_seed_and_the_initialization():
    setting = UnderstandingSetting(depth=8, channels=(4, 4, 4), limit=20)
    models = [build_model(setting, norm, 1, "kaiming") for norm in (True, False)]
    first, second = (model.backbone[0].weight for model in models)
    assert (first == second).all()
    assert 0.2 < float(first.detach().std()) / (2 / 9) ** 0.5 < 2
    assert float(models[1].backbone[0].bias.detach().abs().max()) == 0


def test_the_committed_results_are_those_of_the_default_settings():
    results = read_results(ROOT / "projects/UnderstandingBatchNorm/results/digits.json")
    assert set(results["trials"]) == set(list_trials(UnderstandingSetting()))
    assert UnderstandingSetting(**results["setting"]) == UnderstandingSetting()


@pytest.mark.slow
def test_without_batch_norm_activations_explode_by_depth_and_gradients_have_tails(tmp_path):
    parts = ["--parts", "gradients", "depth", "outputs", "steps"]
    assert main([*parts, "--seeds", "1", "--output", str(tmp_path)]) == 0

    results = read_results(tmp_path / "results.json")
    growth = {norm: collect(results, f"depth/{norm}/kaiming", "growth")[0] for norm in ("bn", "none")}
    assert growth["none"] > 100 > 10 > growth["bn"]
    kurtosis = {norm: collect(results, f"gradients/{norm}/xavier", "excess_kurtosis")[0] for norm in ("bn", "none")}
    assert kurtosis["none"] > kurtosis["bn"] + 3
    assert {path.name for path in tmp_path.glob("*.png")} == {"gradients.png", "depth.png", "outputs.png", "steps.png"}
