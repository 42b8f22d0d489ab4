"""A config from a file and from pairs: read safely, and whatever is wrong with it told in one line that names it."""

import os
import re
from pathlib import Path

import pytest
import train_net
import yaml

from bnext.cli.train import check_run
from bnext.config import load_config
from bnext.errors import BNextError, ConfigError
from tests import tiny
from tests.config.damaged import draw_damaged
from tests.detector_fixtures import digits  # noqa: F401  the fixture

BASE = f"_BASE_: '{tiny.CONFIG}'\n"


def refuse(text="", pairs=(), folder=None):
    """The one line in which a file, or pairs, are refused."""
    file = ""
    if folder is not None:
        file = folder / "config.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        load_config(str(file), [str(word) for word in pairs])
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_a_damaged_config_is_refused_in_a_line_that_names_it_or_can_be_run(seed, digits, tmp_path):  # noqa: F811
    file = tmp_path / "damaged.yaml"
    refused = 0
    for damaged in draw_damaged(80, seed):
        file.write_bytes(damaged.content)
        try:
            check_run(load_config(str(file), ["OUTPUT_DIR", str(tmp_path / "out"), *damaged.pairs]))
            assert not damaged.culprit, damaged
        except BNextError as error:
            refused += 1
            line = str(error)
            assert line.isprintable(), damaged
            assert len(line) < 3000, damaged
            assert damaged.culprit in line, damaged
    assert refused >= 40


# ---- no text is run

TAGS = {
    "SEED: !!python/object/apply:os.system ['touch {ran}']": "!!python/object/apply:os.system",
    "MODEL: {{ANCHOR_GENERATOR: {{SIZES: !!python/object/apply:eval ['[len([3])]']}}}}": "!!python/object/apply:eval",
    "INPUT: {{MIN_SIZE_TRAIN: !!python/tuple [48, 64]}}": "!!python/tuple",
    "SEED: !seed 3": "!seed",
}


@pytest.mark.parametrize("text", TAGS)
@pytest.mark.parametrize("is_base", [False, True])
def test_a_tag_runs_nothing_and_says_how_to_write_the_value(text, is_base, tmp_path):
    ran = tmp_path / "ran"
    text = text.format(ran=ran)
    tag = next(tag for tag in TAGS.values() if tag in text)
    if is_base:
        (tmp_path / "base.yaml").write_text(text)
        text = "_BASE_: base.yaml"
    line = refuse(f"SOLVER: {{MAX_ITER: 3}}\n{text}", folder=tmp_path)
    assert not ran.exists()
    assert tag in line
    assert ("base.yaml" if is_base else "config.yaml") in line
    assert "as [1, 2]" in line


# ---- files


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ["empty file"]),
        ("- MODEL", ["list"]),
        ("word", ["str"]),
        ("MODEL:", ["MODEL must hold keys", "null"]),
        ("SOLVER: 3", ["SOLVER must hold keys", "3"]),
        ("SOLVER: {MAX_ITER: }", ["SOLVER.MAX_ITER must have a value", "null"]),
        ("MODEL: {FPN: {NORM: }}", ["MODEL.FPN.NORM must have a value", "''"]),
        ("DATASETS: {TRAIN: }", ["DATASETS.TRAIN must have a value"]),
        ("3: x", ["3"]),
        ("MODEL: {3: x}", ["Every key in MODEL", "3"]),
        ("SOLVER: {BASE_LR: 0.1, BASE_LR: 0.2}", ["'BASE_LR' twice", "line 2"]),
        ("SOLVER: {BASE_LR: 0.1}\nSEED: 1\nSOLVER: {MAX_ITER: 2}", ["'SOLVER' twice", "line 4"]),
        ("SOLVER:\n\tMAX_ITER: 3", ["line 3", "indent with spaces"]),
        ("SOLVER: {", ["line 2"]),
        ("\0", ["config.yaml"]),
        ("SEED: &a [*a]", ["100,000 values"]),
        ("VERSION: 9", ["VERSION must be 1 to 2"]),
        ("SOLVER: {MAXITER: 3}", ["SOLVER.MAXITER", "Did you mean SOLVER.MAX_ITER?"]),
        ("SOLVER: {NUM_CLASSES: 3}", ["SOLVER.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"]),
        ("solver: {MAX_ITER: 3}", ["solver", "Did you mean 'SOLVER'?"]),
        ("MODEL: {_BASE_: x}", ["_BASE_ stands at the top"]),
    ],
)
def test_a_file_that_is_no_config_names_the_line_or_the_key(text, names, tmp_path):
    line = refuse(BASE + text if ":" in text else text, folder=tmp_path)
    assert "config.yaml" in line
    for name in names:
        assert name in line


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("_BASE_:", "null"),
        ("_BASE_: 7", "7"),
        ("_BASE_: []", "[]"),
        ("_BASE_: [tiny.yaml, 3]", "3"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml"),
        ("_BASE_: [config.yaml]", "config.yaml -> "),
        ("_BASE_: other.yaml", "other.yaml -> "),
        ("_BASE_: .", "a folder"),
        ("_BASE_: nowhere://x.yaml", "nowhere://x.yaml"),
    ],
)
def test_a_base_that_is_missing_or_leads_back(base, name, tmp_path):
    (tmp_path / "other.yaml").write_text("_BASE_: ../" + tmp_path.name + "/config.yaml")
    line = refuse(f"{base}\nSEED: 1", folder=tmp_path)
    assert "_BASE_ in " in line
    assert name in line


def test_paths_that_are_no_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").write_bytes(b"#" * 2_000_000)
    for path in (
        tmp_path,
        tmp_path / "pipe",
        tmp_path / "loop",
        tmp_path / "large",
        "/dev/zero",
        "a\0b",
        tmp_path / "no",
    ):
        with pytest.raises(ConfigError, match="--config-file must be a YAML file"):
            load_config(str(path))


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("my_confg.yaml", "my_config.yaml"),
        ("Digits-Detection/retinanet_R_18_FNP.yaml", "Digits-Detection/retinanet_R_18_FPN.yaml"),
        ("my_base.yaml", "Digits-Detection/retinanet_R_18_FPN_BN.yaml"),
    ],
)
def test_a_path_that_leads_nowhere_is_answered_with_the_nearest(path, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_config.yaml").write_text("{}")
    Path("my_base.yaml").write_text("_BASE_: Digits-Detection/retinanet_R18_FPN_BN.yaml")
    with pytest.raises(ConfigError, match=re.escape(near)):
        load_config(path)


def test_aliases_that_stand_for_millions_of_values_are_refused(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{index}: &a{index} [{', '.join([f'*a{index - 1}'] * 10)}]" for index in range(1, 12)]
    assert "100,000 values" in refuse("\n".join(lines), folder=tmp_path)


def test_an_encoding_that_detectron2_cannot_log_is_named(tmp_path):
    assert "UTF-8" in refuse(BASE.encode("utf-16"), folder=tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_several_bases_line_ends_and_byte_order_marks_are_read(encoding, tmp_path):
    (tmp_path / "one.yaml").write_text(BASE + "SOLVER: {MAX_ITER: 5, BASE_LR: 0.5}")
    (tmp_path / "two.yaml").write_text("SOLVER: {MAX_ITER: 7}")
    text = "_BASE_: [one.yaml, two.yaml]\r\nSOLVER:\r\n  WARMUP_ITERS: 3\r\n"
    (tmp_path / "config.yaml").write_bytes(text.encode(encoding))
    solver = load_config(str(tmp_path / "config.yaml")).SOLVER
    assert (solver.MAX_ITER, solver.BASE_LR, solver.WARMUP_ITERS) == (7, 0.5, 3)


def test_a_config_of_the_first_version_is_converted_as_detectron2_does(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("MODEL: {WEIGHT: x.pkl, RETINANET: {NUM_CONVS: 2}}\nSOLVER: {MAX_ITER: 7}")
    cfg = load_config(str(file))
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.RETINANET.NUM_CONVS, cfg.SOLVER.MAX_ITER) == ("x.pkl", 2, 7)
    file.write_text("VERSION: 1\nMODEL: {WEIGHTX: x.pkl}")
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTX"):
        load_config(str(file))


def test_a_saved_config_is_the_same_config_again(tmp_path):
    pairs = ["OUTPUT_DIR", "2024", "MODEL.WEIGHTS", "[a]", "SOLVER.BASE_LR", "1", "MODEL.BNEXT.RETINANET.WORKERS", "2"]
    pairs += [
        "DATASETS.TRAIN",
        "('a$b: {c}\\n',)",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
        "1e999",
        "SOLVER.MAX_ITER",
        "1e3",
    ]
    cfg = load_config(str(tiny.CONFIG), pairs)
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == ("2024", "[a]", 1.0, 1000)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(str(tmp_path / "config.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_ratios_are_written_without_quotes_and_stay_in_the_file(tmp_path):
    opts = ["DATALOADER.BNEXT.BATCHES", "alternating", "DATALOADER.BNEXT.RATIOS", "[[day, 6], [night, 2]]"]
    cfg = load_config(str(tiny.CONFIG), opts)
    assert cfg.DATALOADER.BNEXT.RATIOS == [["day", 6], ["night", 2]]
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert load_config(str(tmp_path / "config.yaml")).DATALOADER == cfg.DATALOADER


# ---- values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            ("SOLVER.IMS_PER_BATCH", value)
            for value in ("1e9", "0", "-1", "2.5", "nan", "many", "True", 10**30, "None")
        ],
        *[("SOLVER.MAX_ITER", value) for value in (0, -1, 10**30, "inf")],
        *[("SOLVER.BASE_LR", value) for value in ("nan", "1e999", -1, "fast", "9" * 400)],
        *[("SOLVER.STEPS", value) for value in ("(30, 10)", "(-1,)", "('x',)", "5")],
        *[("SOLVER.CHECKPOINT_PERIOD", value) for value in (-1, "often")],
        ("MODEL.ANCHOR_GENERATOR.SIZES", f"[[1{'0' * 400}]]"),
        *[("MODEL.RETINANET.NUM_CLASSES", value) for value in (0, -1, "1e9")],
        *[("INPUT.MIN_SIZE_TRAIN", value) for value in ("()", "(-1,)", "(1e9,)", "800", "[[]]")],
        ("INPUT.MAX_SIZE_TEST", 0),
        ("DATALOADER.NUM_WORKERS", "1e9"),
        ("MODEL.FPN.OUT_CHANNELS", "1e9"),
        ("MODEL.RETINANET.NUM_CONVS", "1e9"),
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbon"),
        ("MODEL.PIXEL_STD", "[1, 0, 1]"),
        ("MODEL.PIXEL_STD", "[1, 1]"),
        ("MODEL.MASK_ON", "yes"),
        ("DATASETS.TRAIN", "digits_train"),
        ("TEST.DETECTIONS_PER_IMAGE", 0),
        ("SEED", 10**30),
        ("SOLVER.BNEXT.VIRTUAL_IMAGES", "1e9"),
        ("MODEL.BNEXT.FPN.EPS", "nan"),
        ("MODEL.BNEXT.FPN.NORMALIZATION_BATCH_SIZE", -1),
    ],
)
def test_a_value_that_no_training_can_do_with_names_its_key_and_the_rule(key, value):
    line = refuse(pairs=(key, value))
    assert line.startswith((f"{key} must ", f"{key.rpartition('.')[0]}: {key.rpartition('.')[2].lower()} must "))


@pytest.mark.parametrize(
    ("pairs", "names"),
    [
        (["SOLVER.MAX_ITER.X", "1"], ["SOLVER.MAX_ITER.X", "Did you mean SOLVER.MAX_ITER?"]),
        (["MODEL", "None"], ["MODEL must be followed by a key"]),
        (["SOLVER.MAX_ITER"], ["pairs"]),
        (["", "1"], ["''"]),
        (["MODEL.NORM", "BN"], ["MODEL.NORM", "MODEL.FPN.NORM"]),
        (["DATASETS.TRAIN", "digits_train"], ["['digits_train']"]),
        (["DATASETS.TRAIN", "(a, b)"], ["['a', 'b']"]),
        (["DATALOADER.BNEXT.RATIOS", "{'day': 6, 'night': 2}"], ["Write pairs, [[day, 6], [night, 2]]"]),
        (["SOLVER.MAX_ITER", "("* 3000], ["SOLVER.MAX_ITER"]),
        (["MODEL.META_ARCHITECTURE", "BNextRetinanet"], ["Did you mean 'BNextRetinaNet'"]),
        (["MODEL.BNEXT.FPN.TRAINING", "Renorm"], ["Did you mean 'renorm'"]),
    ],
)  # fmt: skip
def test_pairs_that_have_not_the_form_of_a_config(pairs, names):
    line = refuse(pairs=pairs)
    for name in names:
        assert name in line


def test_the_command_line_refuses_in_one_line(tmp_path, capsys):
    """No traceback, no advice to load unsafely, nothing run."""
    file = tmp_path / "config.yaml"
    file.write_text(f"SEED: !!python/object/apply:os.system ['touch {tmp_path}/ran']")
    assert train_net.main(["--config-file", str(file)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert "unsafe" not in line
    assert not (tmp_path / "ran").exists()
