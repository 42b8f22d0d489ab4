"""Domains of records and their shares; what is refused, by the key or the domain that the error names."""

import pytest
from detectron2.config import get_cfg

from bnext import add_bnext_config
from bnext.data.sampling.shares import check_ratios, choose_weights, read_domains
from bnext.errors import ConfigError, DatasetError

RECORDS = [{"domain": "day", "dataset_source": 0, "annotations": [{}, {}, {"iscrowd": 1}]}] * 80
RECORDS += [{"domain": "night", "dataset_source": 1, "annotations": [{}] * 8}] * 20
DOMAINS = [record["domain"] for record in RECORDS]
WITHOUT = [{"dataset_source": record["dataset_source"]} for record in RECORDS]
RATIOS = "DATALOADER.BNEXT.RATIOS"


def make_cfg(**values):
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.DATASETS.TRAIN = ("city_day", "city_night")
    cfg.DATALOADER.BNEXT.update({"BATCHES": "composed", **values})
    return cfg


def shares(**values):
    weights = choose_weights(make_cfg(**values), RECORDS, DOMAINS)
    return {domain: weight / sum(weights.values()) for domain, weight in weights.items()}


def test_domains_are_those_of_the_images_or_their_sets():
    assert read_domains(make_cfg(), RECORDS) == DOMAINS
    assert set(read_domains(make_cfg(), WITHOUT)) == {"city_day", "city_night"}


def test_an_image_without_a_domain_is_refused_where_others_have_one():
    with pytest.raises(DatasetError, match="20 without one"):
        read_domains(make_cfg(), [*RECORDS[:80], *WITHOUT[80:]])


@pytest.mark.parametrize(
    ("domains", "records", "name"), [(("day", "fog"), RECORDS, "fog"), ((), WITHOUT[80:], "city_day")]
)
def test_a_domain_without_images_is_refused(domains, records, name):
    cfg = make_cfg()
    cfg.DATASETS.DOMAINS.TRAIN = domains
    with pytest.raises(DatasetError, match=f"Domain '{name}'"):
        read_domains(cfg, records)


def test_ratios_are_the_weights_in_the_order_of_the_data():
    assert list(choose_weights(make_cfg(RATIOS=[["night", 2], ["day", 6]]), RECORDS, DOMAINS).items()) == [
        ("day", 6),
        ("night", 2),
    ]


def test_a_temperature_balances_images():
    assert shares() == {"day": 0.8, "night": 0.2}
    tempered = 80**0.2 / (80**0.2 + 20**0.2)
    assert shares(TEMPERATURE=5.0)["day"] == pytest.approx(tempered, abs=1e-6)
    assert shares(TEMPERATURE=float("inf")) == {"day": 0.5, "night": 0.5}


def test_a_temperature_balances_annotations():
    """160 and 160 objects, 2 and 8 on an image: as many of each are seen with four day images for one of night."""
    assert shares(TEMPERATURE=3.0, BALANCE="annotations") == {"day": 0.8, "night": 0.2}


@pytest.mark.parametrize(
    ("ratios", "name"),
    [([["day", 6], ["nihgt", 2]], "nihgt"), ([["day", 6]], "night"), ([["day", 6], ["night", 2], ["fog", 1]], "fog")],
)
def test_ratios_of_other_domains_are_refused(ratios, name):
    with pytest.raises(ConfigError, match=f"^{RATIOS} .* '{name}'"):
        choose_weights(make_cfg(RATIOS=ratios), RECORDS, DOMAINS)


def test_a_domain_without_annotations_has_none_to_balance():
    records = [*RECORDS[:80], {"domain": "night"}]
    with pytest.raises(DatasetError, match="Domain 'night'"):
        choose_weights(make_cfg(TEMPERATURE=2.0, BALANCE="annotations"), records, [*DOMAINS[:80], "night"])


@pytest.mark.parametrize(("ratios", "size", "fits"), [((6, 2), 8, True), ((6, 2), 4, True), ((6, 2), 6, False)])
def test_ratios_fit_the_batch(ratios, size, fits):
    cfg = make_cfg(RATIOS=[["day", ratios[0]], ["night", ratios[1]]])
    cfg.SOLVER.IMS_PER_BATCH = size
    if fits:
        check_ratios(cfg)
    else:
        with pytest.raises(ConfigError, match=f"^{RATIOS} .* SOLVER.IMS_PER_BATCH"):
            check_ratios(cfg)

    cfg.DATALOADER.BNEXT.BATCHES = "alternating"
    check_ratios(cfg)
