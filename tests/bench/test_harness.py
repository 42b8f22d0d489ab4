"""The harness refuses arms that are not equal, and every claim's arms are; one tiny claim goes from end to end."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import __main__ as command
from bench import dealt, over_workers
from bench.harness import Comparison, Peer, Setting, compiling_afresh, draw_features, measure_difference
from bench.record import read_record
from bnext import use_kernels
from bnext.errors import BNextError
from tests.docs.pages import ROOT
from tests.workers import run_workers

TINY = {"a": (4, 3, 5, 2), "b": (2, 3, 1, 4)}
CLAIMED = [row for claim in command.CLAIMS.values() for row in claim.ROWS if isinstance(row, Comparison)]
QUICK = [row for row in CLAIMED if row.num_workers == 1 and not row.compiles and row.needs is None]


class DetachedMean(nn.BatchNorm2d):
    """The values are right, the gradient of the feature is not."""

    def forward(self, input):
        difference = super().forward(input)
        return difference + (input - input.detach())


class ForeignAffine(nn.BatchNorm2d):
    """The gradient of the weight alone is wrong."""

    def forward(self, input):
        return super().forward(input) + (self.weight - self.weight.detach()).view(-1, 1, 1)


class Broken(nn.BatchNorm2d):
    """One feature of two is no number."""

    def forward(self, input):
        return super().forward(input) * (1.0 if len(input) == 4 else float("nan"))


class ForgottenAverage(nn.BatchNorm2d):
    """Outputs and gradients are right; the running statistics stay as they are."""

    def forward(self, input):
        return nn.functional.batch_norm(input, None, None, self.weight, self.bias, True, 0.1, self.eps)


class Two(nn.Module):
    """A norm for each half of the samples."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([norm(), norm()])

    def forward(self, input):
        return torch.cat([normalize(half) for normalize, half in zip(self.norms, input.chunk(2), strict=True)])


class Exchanged(Two):
    """The statistics are where they belong, the affines are not."""

    def forward(self, input):
        outputs = []
        for normalize, other, half in zip(self.norms, reversed(self.norms), input.chunk(2), strict=True):
            averages = normalize.running_mean, normalize.running_var
            outputs.append(nn.functional.batch_norm(half, *averages, other.weight, other.bias, training=True))
        return torch.cat(outputs)


def norm(kind=nn.BatchNorm2d, **options):
    return kind(3, **options)


def tiny(make_other, differs="", make_ours=norm, shapes=TINY, **options):
    return Comparison("a tiny claim", "the other", shapes, make_ours, make_other, differs, **options)


def prove(comparison):
    """In small: the arms know the numbers of samples and channels, not those of positions."""
    shapes = {}
    for name, (samples, channels, height, width) in comparison.list_shapes().items():
        shapes[name] = (samples, channels, 1 + height // 16, 1 + width // 16)

    differences = []
    for layout in comparison.layouts:
        features, grads = (draw_features(shapes, layout) for _ in range(2))
        with use_kernels(comparison.kernels), compiling_afresh(comparison.compiles):
            differences.append(measure_difference(comparison, features, grads))
    return differences


@pytest.mark.parametrize(
    ("make_other", "fault"),
    [
        (lambda: norm(eps=1e-6), "a difference"),
        (lambda: norm(DetachedMean), "the gradient of [ab]"),
        (lambda: norm(ForeignAffine), "the gradient of weight"),
        (lambda: norm(ForgottenAverage), "the average running_(mean|var)"),
        (lambda: norm(Broken), "a difference of nan in the output b"),
        (lambda: norm(affine=False), "the gradient of weight, as one arm has none"),
        (lambda: norm(track_running_stats=False), "the average running_mean, as one arm has none"),
    ],
)
def test_unequal_arms_are_refused(make_other, fault):
    with pytest.raises(BNextError, match=fault):
        prove(tiny(make_other))
    assert not max(prove(tiny(make_other, differs="as it is another norm"))) < 1e-9


def test_affines_that_are_mixed_up_are_refused():
    two = tiny(Two, make_ours=Two, shapes={"a": TINY["a"]}, layouts=("NCHW",))
    assert max(prove(two)) < 1e-9
    with pytest.raises(BNextError, match="a difference of"):
        prove(dataclasses.replace(two, make_other=Exchanged))
    with pytest.raises(BNextError, match="the (shape of the average|output)"):
        prove(dataclasses.replace(two, make_other=norm))


def test_an_arm_that_has_what_the_other_lacks_is_refused():
    claim = tiny(norm, make_ours=lambda: norm(track_running_stats=False))
    with pytest.raises(BNextError, match="the average running_mean, as one arm has none"):
        prove(claim)


def run_command(monkeypatch, rows, *arguments):
    monkeypatch.setattr(command, "CLAIMS", {"tiny": SimpleNamespace(ROWS=rows)})
    return command.main(["--only", "tiny", "--pairs", "2", *arguments])


def test_a_claim_from_end_to_end(monkeypatch, tmp_path, capsys):
    rows = [
        tiny(norm, goals={"NCHW": 0.001}, shows_errors=True),
        tiny(lambda: norm(eps=1.0), "as its eps is another", layouts=("NCHW",)),
    ]
    json, png = tmp_path / "bench.json", tmp_path / "bench.png"
    assert run_command(monkeypatch, rows, "--json", str(json), "--plot", str(png)) == 0
    shown = capsys.readouterr().out
    assert "as its eps is another: a tiny claim, against the other" in shown

    record = read_record(json)
    assert ("commit" in record.setting) is (ROOT / ".git").exists()
    assert [(speed.layout, speed.ratio.num_pairs) for speed in record.speeds] == [
        ("NCHW", 2),
        ("channels_last", 2),
        ("NCHW", 2),
    ]
    for speed in record.speeds:
        assert speed.megabytes == pytest.approx(144 * 4 / 1e6)
        assert 1e6 * speed.one_pass_ms == pytest.approx(5 * 144 * 4 / speed.copy_gbs)
        assert speed.two_passes_ms == pytest.approx(1.6 * speed.one_pass_ms)
    assert max(quantity.ours for quantity in record.quantities) < 1e-4

    assert command.main(["--show", str(json)]) == 0
    assert capsys.readouterr().out == shown
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_arms_that_do_not_agree_fail_loudly_and_the_others_run(monkeypatch, tmp_path, capsys):
    rows = [tiny(lambda: norm(eps=1.0)), SimpleNamespace(name="a broken row", peer="", run=None), tiny(norm)]
    file = tmp_path / "bench.json"
    assert run_command(monkeypatch, rows, "--json", str(file)) == 1

    record = read_record(file)
    assert [failure.layout for failure in record.failures] == ["NCHW", "channels_last", ""]
    assert [speed.name for speed in record.speeds] == ["a tiny claim"] * 2
    said = capsys.readouterr()
    assert said.out.count("FAILED") == 3
    assert "3 comparisons" in said.err


def test_what_a_machine_lacks_is_left_out():
    num_gpus = torch.cuda.device_count() + 2
    missing = tiny(norm, needs=Peer("no_such_module", "no-such-distribution"))
    cases = [(missing, "cpu"), (tiny(norm, device="cuda"), "cpu"), (tiny(norm, num_workers=num_gpus), "cuda")]
    reasons = [row.run(Setting(device))[0].reason for row, device in cases]
    assert "pip install no-such-distribution" in reasons[0]
    assert "--device cuda" in reasons[1]
    assert f"{num_gpus} GPUs" in reasons[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line_with_the_remedy(capsys):
    assert command.main(["--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "--device cpu" in said


@pytest.mark.slow  # a benchmark proves its claims itself
@pytest.mark.parametrize("comparison", QUICK, ids=lambda one: f"{one.name}-{one.peer}")
def test_arms_of_a_claim_are_equal_or_say_why_not(comparison):
    assert (max(prove(comparison)) < 1e-9) is not bool(comparison.differs)


@pytest.mark.slow  # compilers, and imports of other packages
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's look at a feature
@pytest.mark.parametrize(
    "comparison",
    [row for row in CLAIMED if row.num_workers == 1 and row not in QUICK and row.other_shapes is None],
    ids=lambda one: f"{one.name}-{one.peer}",
)
def test_arms_of_a_slow_claim_are_equal_or_say_why_not(comparison):
    if comparison.needs is not None:
        pytest.importorskip(comparison.needs.module)
    assert (max(prove(comparison)) < 1e-9) is not bool(comparison.differs)


def prove_on_workers(rank, module):
    torch.manual_seed(rank)
    claim = {"dealt": dealt, "over_workers": over_workers}[module]
    rows = [row for row in claim.ROWS if isinstance(row, Comparison) and row.num_workers > 1]
    return [(bool(row.differs), max(prove(dataclasses.replace(row, layouts=("NCHW",))))) for row in rows]


@pytest.mark.parametrize("module", ["dealt", pytest.param("over_workers", marks=pytest.mark.slow)])
def test_arms_on_two_workers_are_equal_or_say_why_not(module):
    for answers in run_workers(prove_on_workers, 2, module):
        for differs, difference in answers:
            assert (difference < 1e-9) is not differs
