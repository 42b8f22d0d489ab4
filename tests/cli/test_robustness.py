"""`bnext robustness` and `bnext corrupt` on a tiny training: what they write, go on with, and refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnext.cli.main import main
from bnext.data.read_image import read_picture
from bnext.data.records import load_records
from bnext.data.write_corrupted import write_corrupted
from bnext.errors import ConfigError, DatasetError
from tests import tiny
from tests.evaluation.own_sets import registered


@pytest.fixture(scope="module")
def measure(finished):
    """Runs the benchmark on the tiny training: the exit status."""
    pairs = ["MODEL.WEIGHTS", f"{finished[0].OUTPUT_DIR}/model_final.pth", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    pairs += ["TEST.PRECISE_BN.NUM_ITER", "2"]

    def run(folder, *words):
        start = ["robustness", "--config-file", str(tiny.CONFIG), "--output", str(folder)]
        return main([*start, *map(str, words), *pairs])

    return run


def test_a_benchmark_is_written_and_goes_on(measure, tmp_path, capsys):
    folder = tmp_path / "out"
    wanted = ["--severities", "5", "--corruptions", "invert"]
    assert measure(folder, *wanted) == 0
    first = json.loads((folder / "robustness.json").read_text())
    assert list(first["corrupted"]) == ["invert"]
    assert "rPC" in capsys.readouterr().out
    (folder / "robustness.png").unlink()

    assert measure(folder, *wanted) == 2
    assert "--resume" in capsys.readouterr().err
    assert measure(folder, *wanted, "--statistics", "adaptive", "--resume") == 2
    assert "same statistics" in capsys.readouterr().err
    assert measure(folder, *wanted, "--resume", "TEST.DETECTIONS_PER_IMAGE", "7") == 2
    assert "same config" in capsys.readouterr().err

    assert measure(folder, *wanted, "low_contrast", "--resume") == 0
    second = json.loads((folder / "robustness.json").read_text())
    assert second["corrupted"]["invert"] == first["corrupted"]["invert"]
    assert list(second["corrupted"]) == ["invert", "low_contrast"]
    assert second["summary"]["corruptions"] == ["invert", "low_contrast"]
    assert not second["summary"]["is_as_published"]
    assert (folder / "robustness.png").is_file()

    (folder / "robustness.json").write_text("{")
    capsys.readouterr()
    assert measure(folder, *wanted, "--resume") == 2
    assert "robustness.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["mini_batch", "mini_batch_as_trained", "adaptive"])
def test_other_statistics_give_other_numbers(measure, tmp_path, statistics):
    results = []
    for kind in ("moving_average", statistics):
        assert measure(tmp_path / kind, "--corruptions", "contrast", "--severities", "5", "--statistics", kind) == 0
        results.append(json.loads((tmp_path / kind / "robustness.json").read_text()))
    assert results[0]["corrupted"] != results[1]["corrupted"]


REFUSED = {
    "a severity of 6": (["--severities", "6"], "--severities"),
    "a corruption that is near one": (["--corruptions", "fogg"], "'fog'"),
    "unknown statistics": (["--statistics", "exact"], "--statistics"),
    "a corrupted set": (["DATASETS.TEST", "('digits_val@fog_3',)"], "digits_val@fog_3"),
    "two sets": (["DATASETS.TEST", "('digits_val', 'digits_train')"], "DATASETS.TEST"),
    "weights that are missing": (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth"),
    "more workers than there are": (["--num-gpus", "1000"], "--num-gpus"),
}


@pytest.mark.parametrize(("words", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_one_line(measure, tmp_path, capsys, words, named):
    pairs = [word for word in words if not words[0].startswith("--")]
    options = [word for word in words if words[0].startswith("--")]
    start = ["robustness", "--config-file", str(tiny.CONFIG), "--output", str(tmp_path / "out"), *options]
    assert main([*start, "MODEL.WEIGHTS", str(tiny.CONFIG), *pairs]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    assert named in line
    assert not (tmp_path / "out" / "robustness.json").exists()


class TestWritten:
    """A corrupted copy as files: the pictures of the variant that is made on the fly."""

    def test_the_pictures_and_annotations(self, digits, tmp_path, capsys):
        folder = tmp_path / "written"
        words = ["--dataset", "digits_val", "--corruption", "fog", "--severity", "3", "--output", str(folder)]
        assert main(["corrupt", *words]) == 0
        assert f"json: {folder}/annotations.json" in capsys.readouterr().out

        content = json.loads((folder / "annotations.json").read_text())
        clean = json.loads((Path(digits) / "digits/annotations/instances_val.json").read_text())
        assert content["annotations"] == clean["annotations"]
        assert content["images"] == clean["images"]
        assert (content["info"]["corruption"], content["info"]["severity"]) == ("fog", 3)
        records = load_records("digits_val@fog_3", tiny.load(tmp_path / "output"))
        assert len(records) == len(content["images"])
        for record, image in zip(records, content["images"], strict=True):
            with Image.open(folder / "images" / image["file_name"]) as picture:
                assert (np.asarray(picture) == read_picture(record, "RGB")).all()

        assert main(["corrupt", *words]) == 2
        assert "written" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "output") == ["written"]

    def test_a_picture_that_cannot_be_read_leaves_nothing(self, digits, tmp_path):
        def load_broken():
            return [{"file_name": "a.png", "image_id": 1, "height": 64, "width": 64, "annotations": []}]

        (tmp_path / "pictures").mkdir()
        with registered(tmp_path, val=load_broken):
            with pytest.raises(DatasetError, match="own_train"):
                write_corrupted("own_train", "fog", 3, tmp_path / "out")  # its pictures are not there
            with pytest.raises(DatasetError, match="own_val@fog_3"):
                write_corrupted("own_val", "fog", 3, tmp_path / "out")  # it has no file
        with pytest.raises(ConfigError, match="6"):
            write_corrupted("digits_val", "fog", 6, tmp_path / "out")
        with pytest.raises(DatasetError, match="digits_val@fog_1"):
            write_corrupted("digits_val@fog_1", "fog", 3, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "train.json"]

    def test_a_picture_cut_off_is_named_and_nothing_is_left(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        with registered(tmp_path):
            for number in range(1, 5):
                Image.fromarray(pixels).save(tmp_path / f"{number}.png")
            whole = (tmp_path / "3.png").read_bytes()
            (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2] + whole[-12:])  # its end mark is there
            with pytest.raises(DatasetError, match=r"3\.png"):
                write_corrupted("own_train", "invert", 5, tmp_path / "out")
        assert not [path.name for path in tmp_path.iterdir() if path.suffix not in (".png", ".json")]
