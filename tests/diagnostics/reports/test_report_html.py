import base64
import dataclasses
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import bnext
from bnext import LevelBatchNorm2d, NormSpec, diagnose
from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.facts import EvaluationFacts, Facts, Origin, WeightsFacts
from bnext.diagnostics.findings import Check, Evidence, Finding, Remedy
from bnext.diagnostics.reports.profiles import QUANTILES, measure_distances
from bnext.diagnostics.reports.report_html import format_html
from bnext.functional import Moments
from tests.diagnostics.reports.browser import run_in_browser

LEVELS = ("p3", "p4", "p5")
EVIL = "</script><script>window[`evil`]=1</script><img src=x onerror=evil()><!--"
VOID = {"meta", "link", "input", "br", "img"}


class Head(nn.Module):
    """A stem, and a norm that knows three levels, whose means are 0, 1 and 2."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.head = LevelBatchNorm2d(4, LEVELS, NormSpec(statistics="per_level", population="per_level"))

    def forward(self, images):
        features = self.stem(images)
        return self.head({level: features + number for number, level in enumerate(LEVELS)})


def make_data(number=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in range(number)]


@pytest.fixture(scope="module")
def facts():
    torch.manual_seed(0)
    model = Head()
    for batch in make_data():
        model(batch)
    return diagnose(model, make_data()).facts


def find(severity, layers, code="BN901", remedy=None, **options):
    words = {"name": "a-name", "title": "the title", "explanation": "Because `x` is **so**.", "depth": "static"}
    check = Check(code=code, cost="7 points", source="a source", examine=lambda facts: [], **words)
    text = options.get("text", f"{len(layers)} layers are ill.")
    return Finding(check, Evidence(severity, tuple(layers), text, remedy or Remedy("Do it.")))


def read_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


class Reader(HTMLParser):
    """Elements with their attributes, ids, and text; a tag that closes nothing is an error."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def list_ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def test_the_strip_shows_where_it_hurts(facts):
    def list_bars(*findings):
        strip = re.search(r'<figure class="strip">.*?</figure>', format_html(Diagnosis(facts, findings)), re.DOTALL)[0]
        return re.findall(r"<rect(?: class=\"(\w+)\")?", strip)

    everywhere = find("error", ["stem.1", "head"])
    assert list_bars(everywhere) == ["error", "error"]
    assert list_bars(everywhere, find("warning", ["head"])) == ["", "warning"], "what all norms have is no place"


def test_the_numbers_of_the_page_are_those_of_the_facts(facts):
    data = read_data(format_html(Diagnosis(facts, ())))
    stem, head = facts.norms
    profile, comparison, distances = (
        data["profile"],
        data["comparison"],
        {one["kind"]: one for one in data["distances"]},
    )

    assert data["paths"] == ["stem.1", "head"]
    assert [data["paths"][norm] for norm in profile["norm"]] == ["stem.1", "head", "head", "head"]
    assert profile["owner"] == ["", *LEVELS]
    for place, population in enumerate((*stem.populations, *head.populations)):
        for name, values in (("mean", population.mean), ("std", population.var.sqrt())):
            expected = torch.quantile(values, torch.tensor(QUANTILES, dtype=values.dtype))
            assert profile[name][place] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-9)

    forwards = [forward for forward in facts.forwards if forward.normalized_by == "mini_batch"]
    means = torch.cat([forward.calls["stem.1"][0].samples.mean for forward in forwards])  # samples are of one size
    (population,) = stem.populations
    distance = (means.mean(0) - population.mean).abs() / (population.var + 1e-5).sqrt()
    expected = torch.quantile(distance, torch.tensor(QUANTILES, dtype=distance.dtype))
    assert comparison["distance"][0] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-9)
    assert comparison["ratio"][0] == pytest.approx(expect_ratio(forwards, population), rel=1e-3)

    means = distances["levels"]["means"][0]
    assert distances["levels"]["names"] == [list(LEVELS)]
    assert means[0][2] == pytest.approx(2, rel=0.01)
    assert means[0][1] == pytest.approx(1, rel=0.01)
    assert means[1][1] == 0
    assert data["norms"]["together"] == [4, 4]
    assert data["norms"]["updates"] == [2, 2]


def expect_ratio(forwards, population):
    samples = [forward.calls["stem.1"][0].samples for forward in forwards]
    means, variances = (torch.cat([getattr(each, name) for each in samples]) for name in ("mean", "var"))
    var = variances.mean(0) + means.var(0, correction=0)
    number = sum(float(each.count.sum()) for each in samples)
    ratio = ((var * number / (number - 1) + 1e-5) / (population.var + 1e-5)).sqrt()
    return torch.quantile(ratio, torch.tensor(QUANTILES, dtype=ratio.dtype)).tolist()


def test_a_population_of_training_images_stands_before_batches(facts):
    norm = facts.norms[0]
    (stored,) = norm.populations
    shifted = Moments(torch.tensor(1e6), stored.mean + 3 * (stored.var + norm.record.eps).sqrt(), 4 * stored.var)
    facts = dataclasses.replace(facts, population={(norm.path, ""): shifted})

    page = format_html(Diagnosis(facts, ()))

    comparison = read_data(page)["comparison"]
    assert comparison["norm"] == [0]
    assert comparison["distance"][0] == pytest.approx([3] * 5, rel=1e-3)
    assert comparison["ratio"][0] == pytest.approx([2] * 5, rel=1e-3)
    assert "a pass over training images" in page


def test_distances_between_domains_come_first(facts):
    day = Moments(torch.tensor(100.0), torch.zeros(4), torch.ones(4))
    night = Moments(torch.tensor(100.0), torch.full((4,), 3.0), torch.full((4,), 4.0))
    facts = dataclasses.replace(facts, domains={"day": {"stem.1": day}, "night": {"stem.1": night}})

    first = measure_distances(facts)[0]

    assert (first.kind, first.path, first.names) == ("domains", "stem.1", ("day", "night"))
    assert first.means[0][1] == first.means[1][0] == pytest.approx(3 / math.sqrt(2.5), rel=1e-4)
    assert first.ratios[0][1] == pytest.approx(2, rel=1e-4)


def test_a_card_says_everything_of_a_finding(facts):
    remedy = Remedy("Set `a`.", keys={"MODEL.A": "b c"}, command="bnext reestimate <x>", call="model.repair()")
    findings = (find("error", ["stem.1", "head"], remedy=remedy), find("note", [], code="BN902"))

    page = format_html(Diagnosis(facts, findings))

    text = Reader(page).text
    for words in ("The title", "BN901", "2 layers are ill.", "7 points", "a source", "stem.1", "Because x is so ."):
        assert words in text
    for words in ("MODEL.A 'b c'", "bnext reestimate <x>", "model.repair()"):
        assert f"<pre>{html.escape(words)}</pre>" in page
    assert page.index("BN901") < page.index("BN902")
    assert '<div class="verdict error">' in page
    assert "<code>a</code>" in page
    assert read_data(page)["norms"]["findings"] == [[0], [0]]


def test_healthy_models_get_a_friendly_page(facts):
    page = format_html(Diagnosis(facts, ()))

    assert '<div class="verdict healthy">' in page
    assert "good health" in page


def test_only_sections_whose_facts_are_there():
    static = set(Reader(format_html(diagnose(Head()))).list_ids())

    assert {"verdict", "inventory", "depth"} <= static
    assert not static & {"averages", "distances", "evaluation", "failures", "chart-mean"}


def test_everything_that_is_there_has_a_section(facts):
    evaluation = EvaluationFacts(losses={"mini_batch": 1.25}, ap={"population": 34.1, "mini_batch": 39.1})
    facts = dataclasses.replace(facts, evaluation=evaluation)

    reader = Reader(format_html(Diagnosis(facts, (), failures=("AP is <unknown>.",))))

    ids = reader.list_ids()
    assert len(ids) == len(set(ids))
    sections = [
        "verdict",
        "findings",
        "inventory",
        "depth",
        "averages",
        "distances",
        "evaluation",
        "advice",
        "failures",
    ]
    assert [one for one in ids if one in sections] == sections
    assert "AP is <unknown>." in reader.text
    assert "34.1" in reader.text
    assert re.search(rf"bnext {bnext.__version__}, Python .*torch .*\d{{4}}-\d\d-\d\d", reader.text)


def test_a_model_without_norms():
    page = format_html(diagnose(nn.Linear(2, 2)))

    assert "There is no norm" in page
    assert "inventory" not in Reader(page).list_ids()


@pytest.mark.parametrize("data", [None, [torch.randn(2, 4, 3, 3)]])
def test_names_with_markup_are_text(data):
    model = nn.Sequential()
    model.add_module(EVIL, nn.BatchNorm2d(4))
    model.add_module("a&b\"'<b>\u202e\ud800", nn.BatchNorm2d(4))
    diagnosis = diagnose(model, data)
    remedy = Remedy(EVIL, keys={EVIL: EVIL}, command=EVIL, call=EVIL)
    facts = dataclasses.replace(diagnosis.facts, model_name=EVIL, evaluation=EvaluationFacts(ap={EVIL: 1.0}))

    page = format_html(Diagnosis(facts, (find("error", [EVIL], text=EVIL, remedy=remedy),), failures=(EVIL,)))

    tags = [tag for tag, _ in Reader(page).elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert read_data(page)["paths"] == [EVIL, "a&b\"'<b>\u202e\ud800"]
    page.encode()


def test_the_page_asks_for_nothing(facts):
    page = format_html(Diagnosis(facts, (find("error", ["head"]),)))

    for _, attributes in Reader(page).elements:
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "#").startswith("#") or attributes[name] == "data:,"
    assert not re.findall(r"url\(|@import|\bfetch\(|XMLHttpRequest|\bimport\(", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_the_policy_allows_the_script_of_the_page_alone(facts):
    page = format_html(Diagnosis(facts, ()))

    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def multiply(facts, number, **options):
    norm = facts.norms[0]
    records = [dataclasses.replace(norm.record, path=f"layers.{place}.norm", **options) for place in range(number)]
    norms = tuple(dataclasses.replace(norm, record=record) for record in records)
    calls = [{record.path: forward.calls[norm.path] for record in records} for forward in facts.forwards]
    pairs = zip(facts.forwards, calls, strict=True)
    forwards = tuple(dataclasses.replace(forward, calls=of_forward) for forward, of_forward in pairs)
    return dataclasses.replace(facts, norms=norms, forwards=forwards)


def test_a_norm_costs_few_bytes(facts):
    sizes = [len(format_html(Diagnosis(multiply(facts, number), ()))) for number in (1, 201)]

    assert (sizes[1] - sizes[0]) / 200 < 1000  # 5,000 norms in 5 MB


def test_odd_statistics_are_no_numbers():
    broken, lazy = nn.BatchNorm2d(3), nn.LazyBatchNorm2d()
    broken.running_var.copy_(torch.tensor([-1.0, float("nan"), float("inf")]))
    broken.running_mean.fill_(float("nan"))
    model = nn.Sequential(broken, lazy, nn.BatchNorm2d(2, device="meta"), nn.GroupNorm(1, 4), nn.BatchNorm2d(1))

    data = read_data(format_html(diagnose(model)))

    assert data["profile"]["mean"][0] is None
    assert data["profile"]["num_invalid"][0] == 3


def test_empty_facts():
    assert "There is no norm" in format_html(Diagnosis(Facts(norms=()), ()))


# ---- in a browser


@pytest.fixture(scope="module")
def sick_page(facts):
    name = "a_name_that_is_as_long_as_names_of_folders_are/"
    command = f"bnext reestimate --config-file {name * 2}config.yaml --population per_level --output repaired.pth"
    remedy = Remedy("Do it.", keys={"MODEL.BNEXT.RETINANET.STATISTICS": "shared"}, command=command)
    facts = dataclasses.replace(
        facts, model_name=name, origin=Origin("config", name * 2), weights=WeightsFacts(name * 2)
    )
    findings = (
        find("error", ["head", name], remedy=remedy),
        find("warning", ["stem.1"], code="BN902"),
        find("note", [], code="BN903"),
    )
    return format_html(Diagnosis(facts, findings, failures=("Nobody knows.",)))


@pytest.mark.slow
def test_groups_unfold_and_are_searched(sick_page):
    seen = run_in_browser(
        sick_page,
        """
        const rows = () => all(".group[open] tbody tr").map((row) => row.querySelector("th").textContent);
        const before = rows();
        get("#unfold").click();
        await wait();
        const unfolded = rows();
        get("#query").value = "bn902";
        get("#query").dispatchEvent(new Event("input"));
        const found = rows(), shown = get("#shown").textContent, hidden = all(".group[hidden]").length;
        get("#unfold").click();
        await wait();
        const folded = rows();
        get(".show").click();
        await wait();
        return { before, unfolded, found, shown, hidden, folded, asked: rows() };
        """,
    )

    assert seen["before"] == seen["folded"] == []
    assert seen["unfolded"] == ["stem.1", "head"]
    assert seen["found"] == ["stem.1"]
    assert (seen["shown"], seen["hidden"]) == ("1 of 2 norms", 1)
    assert seen["asked"] == ["head"]


@pytest.mark.slow
@pytest.mark.parametrize("is_dark", [False, True])
def test_dark_and_light(sick_page, is_dark):
    seen = run_in_browser(
        sick_page,
        """
        const look = () => [get("#theme").textContent, getComputedStyle(document.body).backgroundColor];
        const first = look();
        get("#theme").click();
        const second = look();
        get("#theme").click();
        return [first, second, look()];
        """,
        is_dark=is_dark,
    )

    light, dark = ["☾ Dark", "rgb(244, 246, 248)"], ["☀ Light", "rgb(17, 21, 26)"]
    assert seen == ([dark, light, dark] if is_dark else [light, dark, light])


@pytest.mark.slow
def test_a_phone_scrolls_in_one_direction_alone(sick_page):
    seen = run_in_browser(
        sick_page,
        """
        get("#unfold").click();
        for (const details of all("details")) details.open = true;
        await wait();
        const scroll = document.scrollingElement.scrollWidth;
        return { inner: innerWidth, scroll, charts: all("svg.plot path").length };
        """,
        width=360,
    )

    assert seen["inner"] == 360
    assert seen["scroll"] <= 360
    assert seen["charts"] > 8


@pytest.mark.slow
def test_charts_say_what_they_are_pointed_at(sick_page):
    seen = run_in_browser(
        sick_page,
        """
        const chart = get("#chart-mean svg"), say = () => get("#chart-mean output").textContent;
        const before = say(), box = chart.getBoundingClientRect();
        chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 20, clientY: box.top + 20 }));
        const last = say(), together = get("#chart-std output").textContent;
        chart.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
        const first = say();
        chart.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
        return { before, last, together, first, second: say(), now: chart.getAttribute("aria-valuenow") };
        """,
    )

    assert seen["before"].startswith("Point at a layer")
    assert seen["last"].startswith("head [p5] · running mean: median")
    assert seen["together"].startswith("head [p3] · running standard deviation")
    assert seen["first"].startswith("stem.1 ·")
    assert seen["second"].startswith("head [p3]")
    assert seen["now"] == "2"


@pytest.mark.slow
def test_a_slider_goes_through_the_layers(facts):
    moments = [Moments(torch.tensor(9.0), torch.full((4,), float(mean)), torch.ones(4)) for mean in (0, 1, 3)]
    by_path = [{"stem.1": moments[0], "head": moments[0]}, {"stem.1": moments[1], "head": moments[2]}]
    facts = dataclasses.replace(facts, domains={"day": by_path[0], "<night>": by_path[1]})

    seen = run_in_browser(
        format_html(Diagnosis(facts, ())),
        """
        const figure = get("#distances-domains"), slider = figure.querySelector("input");
        const look = () => [figure.querySelector(".layer").textContent, figure.querySelectorAll("td")[2].textContent];
        const first = look();
        slider.value = 0;
        slider.dispatchEvent(new Event("input"));
        const second = look();
        const cell = figure.querySelectorAll("td")[2];
        cell.dispatchEvent(new PointerEvent("pointerenter"));
        return { first, second, says: figure.querySelector(".matrix + .readout").textContent };
        """,
    )

    assert seen["first"] == ["head", "3"]
    assert seen["second"] == ["stem.1", "1"]
    assert seen["says"] == "day and <night>: means are apart by 1 standard deviations, averaged over channels."


@pytest.mark.slow
def test_markup_in_names_stays_text():
    model = nn.Sequential()
    model.add_module(EVIL, nn.BatchNorm2d(4, momentum=0.9))
    page = format_html(diagnose(model, [torch.randn(2, 4, 3, 3)]))

    seen = run_in_browser(
        page,
        """
        get("#unfold").click();
        await wait();
        get("#chart-distance svg").dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
        return { evil: window.evil, images: all("img").length, row: get("tbody th").textContent };
        """,
    )

    assert seen == {"images": 0, "row": EVIL}


@pytest.mark.slow
def test_thousands_of_norms_stay_usable(facts):
    facts = multiply(facts, 5000, num_features=1234)
    page = format_html(Diagnosis(facts, (find("error", ["layers.17.norm", "layers.4999.norm"]),)))

    seen = run_in_browser(
        page,
        """
        get("#unfold").click();
        await wait();
        const rows = all("tbody tr").length, first = [...get("tbody tr").children].map((cell) => cell.textContent);
        get("#query").value = "bn901";
        get("#query").dispatchEvent(new Event("input"));
        return { rows, first, shown: get("#shown").textContent, elements: all("*").length };
        """,
    )

    assert len(page) < 5e6
    assert seen["rows"] == 201
    assert seen["first"] == ["layers.0.norm", "1,234", "4", "144", "1", "2", ""]
    assert seen["shown"] == "2 of 5,000 norms"
    assert seen["elements"] < 3000
