"""The study of domains: whose answers its rows have, how its numbers are put together, and one row of each part."""

import json
from types import SimpleNamespace

import adaptation
import adversarial
import domain_pictures
import domain_table
import pytest
import run_domains

from bnext.config.recipe import resolve_norms
from bnext.layers import NormSpec
from bnext.studies.runner import Training
from tests.markdown import read_tables
from tests.tiny import ROOT

CONFIGS = ROOT / "projects/Domains/configs"
TINY = [
    "SOLVER.MAX_ITER",
    "2",
    "SOLVER.IMS_PER_BATCH",
    "6",
    "INPUT.MIN_SIZE_TRAIN",
    "(64,)",
    "INPUT.MIN_SIZE_TEST",
    "64",
]
TINY += ["TEST.PRECISE_BN.NUM_ITER", "2", "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.FPN.OUT_CHANNELS", "16"]


def load_rows(output, *rows):
    trainings = [Training(row, 1) for row in rows]
    return domain_table.load_configs(str(CONFIGS / "three_domains.yaml"), str(output), trainings, TINY)


def read_answers(cfg, place):
    spec = resolve_norms(cfg).places[place].spec
    return spec.statistics, spec.population, spec.affine


def test_rows_are_those_of_table_5_with_domains_in_the_place_of_levels(digits, tmp_path):
    configs = load_rows(tmp_path, 1, 2, 3, 4, 5, 6, "clean")
    for training, cfg in configs.items():
        if training.row == "clean":
            assert cfg.DATASETS.TRAIN == ("clean_train",)
            continue
        of_levels = [
            vars(NormSpec.from_table5_row(training.row))[key] for key in ("statistics", "population", "affine")
        ]
        of_domains = tuple(answer.replace("level", "domain") for answer in of_levels)
        assert read_answers(cfg, "RESNETS") == of_domains
        of_head = read_answers(cfg, "RETINANET")
        assert [("domain" in answer) for answer in of_head] == [answer == "per_domain" for answer in of_domains]
        assert all("level" in answer for answer in of_head[:2])


@pytest.mark.slow
def test_a_row_is_trained_and_another_made_of_it(digits, tmp_path):
    output = tmp_path / "out"
    run_domains.run_part("table", load_rows(output, 3, 4), str(output), False)
    rows = json.loads((output / "table/results.json").read_text())["rows"]
    assert set(rows) == {"3, seed 1", "4, seed 1"}
    assert set(rows["4, seed 1"]) == {f"{domain}/AP" for domain in domain_table.DOMAINS}
    assert (output / "table/table.png").exists()


@pytest.mark.slow
def test_targets_a_stream_and_adversarial_copies(digits, tmp_path):
    for part in ("targets", "stream", "adversarial"):
        args = SimpleNamespace(seeds=[1], output=str(tmp_path / "out"), num_gpus=1, opts=TINY)
        configs = run_domains.load_part(part, args)
        run_domains.run_part(part, configs, args.output, False)
        assert (tmp_path / f"out/{part}/{part}.png").exists()
        rows = json.loads((tmp_path / f"out/{part}/results.json").read_text())["rows"]
        assert all(0 <= ap <= 100 for row in rows.values() for ap in row.values())


def test_numbers_of_seeds_become_means_and_deviations():
    rows = {
        f"{row}, seed {seed}": dict.fromkeys([f"{name}/AP" for name in domain_table.DOMAINS], 10.0 * row + seed)
        for row in (1, 4)
        for seed in (1, 3)
    }
    rows |= {f"{name}, seed 1": {f"{name}/AP": 50.0} for name in domain_table.DOMAINS}
    (table,) = read_tables(domain_table.format_table({"rows": rows}))
    assert table[1][1:] == ["12.0 ± 1.4"] * 5
    assert table[-1][1:] == ["50.0"] * 5

    phases = {
        f"{rule}/{phase}": float(phase)
        for rule in (*adaptation.RULES, "own statistics")
        for phase in range(len(adaptation.PHASES))
    }
    (table,) = read_tables(domain_pictures.format_stream({"rows": {"1": phases}}))
    assert table[1][1:] == ["0.0", "2.5", "6.5", "10.5", "13.0"]
    rows = {
        f"{row}, seed {seed}": {f"AP/{test}": seed for test in adversarial.TESTS}
        for row in ("clean", "apart")
        for seed in (1, 3)
    }
    (table,) = read_tables(adversarial.format_table({"rows": rows}))
    assert table[2][1:] == ["2.0 ± 1.4"] * len(adversarial.TESTS)
