"""The study of normalization batch sizes: what it refuses, its pictures of digits, its effect in a short training."""

import dataclasses

import pytest
import torch
from run_normalization_batch_size import main
from size_setting import SizeSetting, check_images
from size_trials import list_trials
from varied_images import VariedImages

from bnext.errors import ConfigError
from bnext.studies.images import load_images
from bnext.studies.results_file import read_results
from bnext.studies.trials import collect
from tests.tiny import ROOT

SETTING = SizeSetting(side=8)


@pytest.mark.parametrize(
    "wrong",
    [{"sizes": [3]}, {"sizes": []}, {"model": "vgg"}, {"rates": [-1.0]}, {"epochs": 0}, {"contrasts": [float("nan")]}],
)
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SizeSetting(**wrong)


def test_images_that_do_not_fit_are_refused():
    images = load_images("val", side=8)
    with pytest.raises(ConfigError, match="total_batch_size"):
        check_images(dataclasses.replace(SETTING, total_batch_size=1024), images, images, side=8)
    with pytest.raises(ConfigError, match="sizes"):
        check_images(dataclasses.replace(SETTING, sizes=(1,), limit=None), images, images, side=4)


def test_a_picture_is_varied_in_its_own_way_again_and_again():
    images = load_images("train", side=8, limit=40)
    varied = VariedImages(images, dataclasses.replace(SETTING, shift=0), 1.0, seed=3)
    everything = varied.select(torch.arange(40)).pixels
    assert torch.equal(varied.select(torch.tensor([7, 2])).pixels, everything[[7, 2]])

    plain = VariedImages(images, dataclasses.replace(SETTING, shift=0), 0.0, seed=3).select(torch.arange(40)).pixels
    bright = plain.flatten(1).max(1)[0] > 0.1
    ratios = (everything / plain).flatten(1)[bright]
    factors = torch.nanmean(ratios.where(plain.flatten(1)[bright] > 0.1, torch.nan), 1)
    assert 0.7 < factors.log().std() < 1.4, "the contrast is the deviation of the logarithm"


def test_a_picture_is_moved_by_whole_pixels():
    images = load_images("train", side=8, limit=20)
    moved = VariedImages(images, SETTING, 0.0, seed=1, repeats=2).select(torch.arange(40))
    padded = torch.nn.functional.pad(images.pixels, (1, 1, 1, 1))
    crops = torch.stack([padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)], 1).flatten(0, 1)
    assert all((picture == crops).flatten(1).all(1).any() for picture in moved.pixels)


def test_trainings_that_several_parts_need_are_there_once():
    names = list(list_trials(SETTING))
    assert len(names) == len(set(names)) == 2 * 7 + 5 + 2 * 10
    assert set(list_trials(SETTING, ["contrast"])) < set(names)


def test_the_committed_results_are_those_of_the_default_settings():
    results = read_results(ROOT / "projects/NormalizationBatchSize/results/digits.json")
    assert set(results["trials"]) == set(list_trials(SETTING))
    assert SizeSetting(**results["setting"]) == SETTING


@pytest.mark.slow
def test_images_of_different_contrast_make_an_nbs_of_2_collapse(tmp_path):
    pairs = ["epochs=12", "sizes=[2,128]", "contrasts=[0,1]", "num_estimated=512"]
    assert main(["--parts", "sizes", "--seeds", "1", "--output", str(tmp_path), *pairs]) == 0

    results = read_results(tmp_path / "results.json")
    plain, different = (collect(results, f"contrast_{value}/nbs_2", "mini_batch")[0] for value in (0, 1))
    assert different > collect(results, "contrast_1/nbs_2", "val")[0] + 8
    assert different > collect(results, "contrast_1/nbs_2", "layer_by_layer")[0] + 8
    assert plain < collect(results, "contrast_0/nbs_2", "val")[0] + 3
    assert (tmp_path / "sizes.png").exists()
