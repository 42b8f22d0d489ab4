"""Both towers of a head side by side: half the collectives, and the numbers of one tower after the other."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bnext.heads import RetinaNetHead
from bnext.heads.lock_step import name_levels, run_tower
from bnext.layers import CycleBatchNormList, LevelBatchNorm2d, NormSpec
from bnext.surgery import convert_norm
from tests.collectives import NotedCollectives
from tests.heads.detectors import make_batch, make_detector, run_step
from tests.workers import run_workers

LEVELS = ("p3", "p4")
ROW1, ROW4 = (NormSpec.from_table5_row(row, workers="all") for row in (1, 4))
TOWERS = ("cls_subnet", "bbox_subnet")
# Sizes (N, H, W) of the levels, per worker.
SHARES = {
    1: [[(2, 4, 4), (2, 2, 2)]],
    2: [[(1, 6, 4), (1, 3, 2)], [(2, 4, 5), (2, 2, 3)]],
    3: [[(1, 4, 4), (1, 2, 2)], [(0, 6, 6), (0, 3, 3)], [(3, 6, 4), (3, 3, 2)]],
}


def make_head(spec=ROW1, depth=4, seed=0):
    torch.manual_seed(seed)
    shapes = [ShapeSpec(channels=4)] * len(LEVELS)
    head = RetinaNetHead(
        levels=LEVELS, norm=spec, input_shape=shapes, num_classes=2, num_anchors=1, conv_dims=[4] * depth
    )
    for conv in head.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=0.3)
    return head.double().train()


def make_inputs(share, rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 4, h, w, generator=generator).to(dtype).requires_grad_() for n, h, w in share]


class OneAfterTheOther(RetinaNetHead):
    """The towers as they run where nothing is shared."""

    def forward_towers(self, features):
        by_level = name_levels(self.levels, features)
        return {name: list(run_tower(getattr(self, name), by_level).values()) for name in TOWERS}


def run_head(head, share, rank, call=None):
    """Outputs and gradients of a step, and what was sent in it."""
    inputs = make_inputs(share, rank)
    head.zero_grad()
    with NotedCollectives() as sent:
        logits, deltas = head(inputs) if call is None else call(head, inputs)
        loss = sum(y.square().sum() for y in logits) + 3 * sum(y.square().sum() for y in deltas)
        loss.backward()
    gradients = [*(x.grad for x in inputs), *(parameter.grad for parameter in head.parameters())]
    return ([*logits, *deltas], gradients), sent


def compare(head, share, rank, call=None):
    """Side by side, and one tower after the other: numbers of collectives."""
    other = copy.deepcopy(head)
    other.__class__ = OneAfterTheOther
    results, sent = run_head(head, share, rank, call)
    expected, sent_alone = run_head(other, share, rank)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head.state_dict(), other.state_dict(), rtol=1e-10, atol=1e-12)
    assert call or sent.num_bytes == sent_alone.num_bytes
    return len(sent.names), len(sent_alone.names)


def compare_heads(rank, shares):
    specs = [ROW1, ROW4] if len(shares) == 2 else [ROW1]
    return [compare(make_head(spec), shares[rank], rank) for spec in specs]


@pytest.mark.parametrize("world_size", SHARES)
def test_a_head_side_by_side(world_size):
    number = 8 if world_size > 1 else 0
    for counts in run_workers(compare_heads, world_size, SHARES[world_size]):
        assert set(counts) == {(number, 2 * number)}


def train_detectors(rank):
    counts = []
    for eps in (1e-5, 1e-3):
        model = make_detector(norm="SyncBN", row=1, pairs=("MODEL.RETINANET.NUM_CONVS", 4))
        for norm in model.head.bbox_subnet:
            if isinstance(norm, LevelBatchNorm2d):
                norm.eps = eps
        with NotedCollectives() as sent:
            run_step(model, make_batch((64, 96)[: rank + 1], seed=rank))
        counts.append((len(sent.names), sent.num_bytes))
    return counts


def test_collectives_of_a_training_step_and_of_towers_that_cannot_share():
    num_bytes = 8 * (5 * (2 * 32 + 1) + 2 * 32) * 4  # 8 norms: moments of 5 levels, and two sums; float32
    for sent, sent_apart in run_workers(train_detectors, 2):
        assert sent == (8, num_bytes)
        assert sent_apart == (16, num_bytes)


# ---- norms that were changed


class OfSomebodyElse(LevelBatchNorm2d):
    """A forward of its own, which knows of features alone."""

    def forward(self, features):
        return {level: 2 * y for level, y in super().forward(features).items()}


def compare_changed(rank, share):
    counts = {"not shared": compare(make_head(NormSpec()), share[rank], rank)}
    head = make_head()
    head.cls_subnet[4] = nn.GroupNorm(2, 4).double()
    counts["foreign"] = compare(head, share[rank], rank)

    head = make_head()
    head.bbox_subnet[1] = CycleBatchNormList(num_features=4, levels=LEVELS, spec=ROW4).double()
    head.bbox_subnet[4] = OfSomebodyElse(4, LEVELS, ROW1).double()
    counts["of other classes"] = compare(head, share[rank], rank)

    head = make_head()
    head.bbox_subnet[1].spec = ROW1.replace(frozen="both")
    counts["frozen"] = compare(head, share[rank], rank)

    head = make_head()
    head.bbox_subnet[1].spec = ROW1.replace(workers="one")
    counts["of one worker"] = compare(head, share[rank], rank)

    head = make_head()
    head.bbox_subnet = nn.Sequential(*list(head.bbox_subnet)[:-3])
    counts["shorter"] = compare(head, share[rank], rank)

    head = make_head()
    head.bbox_subnet[1] = head.cls_subnet[1]
    counts["the same norm"] = compare(head, share[rank], rank)

    head = make_head()
    convert_norm(head, {"": NormSpec(workers="all", affine="per_level")})
    counts["converted"] = compare(head, share[rank], rank)
    return counts


def test_heads_whose_norms_were_changed():
    for counts in run_workers(compare_changed, 2, SHARES[2]):
        assert counts == {
            "not shared": (0, 0),
            "foreign": (8, 14),
            "of other classes": (10, 16),
            "frozen": (8, 14),
            "of one worker": (8, 14),
            "shorter": (14, 14),
            "the same norm": (10, 16),
            "converted": (8, 16),
        }


# ---- what else runs heads


def watch_one_worker(rank, shares):
    """A probe on the first worker alone, as the doctor's: of every module of both towers."""
    head, calls = make_head(), []
    for path, module in head.named_modules():
        if rank == 0 and path.startswith(TOWERS):
            module.register_forward_hook(lambda module, args, output, path=path: calls.append(path))
    compare(head, shares[rank], rank)
    return calls


def test_modules_of_one_worker_are_watched():
    calls, nothing = run_workers(watch_one_worker, 2, SHARES[2], timeout=30)
    calls = calls[: len(calls) // 2]  # the copy has the hooks, too
    for tower in TOWERS:
        for index in range(12):  # a norm gets both levels at once
            assert calls.count(f"{tower}.{index}") == (1 if index % 3 == 1 else 2)
    assert calls[:4] == ["cls_subnet.0"] * 2 + ["bbox_subnet.0"] * 2
    assert nothing == []


def call_checkpointed(head, inputs):
    return checkpoint(head, inputs, use_reentrant=False)


def run_in_half(head, share, rank):
    head = head.float()
    with torch.autocast("cpu", torch.bfloat16):
        logits, deltas = head([x.float() for x in make_inputs(share, rank)])
        sum(y.float().square().sum() for y in (*logits, *deltas)).backward()
    return logits, deltas, [parameter.grad for parameter in head.parameters()], head.state_dict()


def run_otherwise(rank, shares):
    counts = compare(make_head(), shares[rank], rank, call_checkpointed)

    heads = make_head(), make_head()
    heads[1].__class__ = OneAfterTheOther
    results, expected = (run_in_half(head, shares[rank], rank) for head in heads)
    assert results[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
    return counts


def test_a_head_in_a_checkpoint_and_in_half_precision():
    for counts in run_workers(run_otherwise, 2, SHARES[2], timeout=30):
        assert counts == (12, 16)  # its forward is computed again


class OneTower(nn.Module):
    """A model whose loss is of one tower."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features):
        return sum(y.square().sum() for y in self.head(features)[0])


def train_one_tower(rank, shares):
    """Gradients as DistributedDataParallel leaves them."""
    gradients = []
    for kind in (RetinaNetHead, OneAfterTheOther):
        head = make_head()
        head.__class__ = kind
        model = DistributedDataParallel(OneTower(head), find_unused_parameters=True)
        model(make_inputs(shares[rank], rank)).backward()
        gradients.append({name: parameter.grad for name, parameter in head.named_parameters()})
    return gradients


def test_a_loss_of_one_tower_in_ddp():
    for gradients, expected in run_workers(train_one_tower, 2, SHARES[2], timeout=30):
        unused = [name for name, gradient in expected.items() if gradient is None]
        assert {name.split(".")[0] for name in unused} == {"bbox_subnet", "bbox_pred"}
        assert all(gradients[name] is None or not gradients[name].any() for name in unused)
        used = {name: gradient for name, gradient in expected.items() if gradient is not None}
        torch.testing.assert_close({name: gradients[name] for name in used}, used, rtol=1e-9, atol=1e-11)


def count_gathers(module):
    graphs = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    return sum("all_gather" in str(node.target) for graph in graphs for node in graph.nodes)


def compile_head(rank, share):
    graphs = []
    head = make_head(depth=1)
    other = copy.deepcopy(head)

    def keep(graph, inputs):
        graphs.append(count_gathers(graph))
        return graph

    compiled = torch.compile(head, fullgraph=True, backend=keep)
    results, _ = run_compiled(compiled, head, share[rank], rank)
    torch.testing.assert_close(results, run_compiled(other, other, share[rank], rank)[0], rtol=1e-9, atol=1e-11)
    return graphs


def run_compiled(called, head, share, rank):
    inputs = make_inputs(share, rank)
    logits, deltas = called(inputs)
    (sum(y.square().sum() for y in logits) + 3 * sum(y.square().sum() for y in deltas)).backward()
    return ([*logits, *deltas], [parameter.grad for parameter in head.parameters()]), head.state_dict()


@pytest.mark.slow
def test_a_compiled_head_is_one_graph_with_one_collective():
    assert run_workers(compile_head, 2, SHARES[2], timeout=200) == [[1], [1]]
