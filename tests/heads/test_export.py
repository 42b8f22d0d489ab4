"""A folded head computes what it did, and leaves for other runtimes as convolutions alone; detectors are traced."""

import copy
import io
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN

from bnext.errors import ConfigError
from bnext.heads import RetinaNetHead
from bnext.heads.lock_step import run_tower
from bnext.layers import TABLE5_ROWS, NormSpec
from bnext.layers.walk import find_bnext_norms
from bnext.surgery.fold import fold_norms
from tests.cases import randomize
from tests.heads.detectors import make_detector, make_model

LEVELS = ("p3", "p4", "p5")
TOLERANCE = 1e-5  # relative to the largest output


def make_head(row, dtype=torch.float32):
    torch.manual_seed(0)
    head = RetinaNetHead(
        levels=LEVELS,
        norm=NormSpec.from_table5_row(row),
        input_shape=[ShapeSpec(channels=8)] * len(LEVELS),
        num_classes=3,
        num_anchors=2,
        conv_dims=[8, 8],
    )
    for tower in (head.cls_subnet, head.bbox_subnet):
        for index in (1, 4):
            randomize(tower[index], seed=index)
        for index in (0, 3):
            torch.nn.init.kaiming_normal_(tower[index].weight)  # of detectron2's 0.01 little is left after a tower
    return head.to(dtype).eval()


def make_features(num_samples, side, dtype=torch.float32):
    generator = torch.Generator().manual_seed(side)
    sizes = [(side // 2**i, side // 2**i + 2) for i in range(len(LEVELS))]
    return [torch.randn(num_samples, 8, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


@torch.no_grad()
def run(head, features):
    logits, deltas = head(features)
    return [*logits, *deltas]


def assert_close(outputs, expected, tolerance=TOLERANCE):
    for output, before in zip(outputs, expected, strict=True):
        assert np.abs(np.asarray(output) - np.asarray(before)).max() <= tolerance * before.abs().max()


@pytest.fixture(scope="module")
def folded_head():
    head = make_head(1)
    fold_norms(head)
    return head


@pytest.fixture(scope="module")
def dynamic_shapes():
    """Any number of samples, the same for all levels, and any sizes."""
    samples = torch.export.Dim("samples", min=1, max=64)
    return ([{0: samples, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} for _ in LEVELS],)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.float64, 1e-12)])
def test_row_1_folds_for_all_levels(dtype, tolerance):
    head, features = make_head(1, dtype), make_features(2, 16, dtype)
    expected = run(head, features)
    report = fold_norms(head)
    assert len(report.folded) == 4
    assert not report.left
    assert_close(run(head, features), expected, tolerance)


@pytest.mark.parametrize("row", [row for row, answers in TABLE5_ROWS.items() if "per_level" in answers[1:]])
def test_other_rows_fold_for_one_level(row):
    head, features = make_head(row), make_features(2, 16)
    with pytest.raises(ConfigError, match=r"domain must be one of 'p3', 'p4', 'p5'.*\(cls_subnet.1\)"):
        fold_norms(head)
    for level, feature in zip(LEVELS, features, strict=True):
        one = copy.deepcopy(head)
        assert len(fold_norms(one, level).folded) == 4
        for name in ("cls_subnet", "bbox_subnet"):
            with torch.no_grad():
                expected = run_tower(getattr(head, name), {level: feature})[level]
                assert_close([getattr(one, name)(feature)], [expected])
                assert_close([run_tower(getattr(one, name), {level: feature})[level]], [expected])


def test_torch_export(folded_head, dynamic_shapes):
    program = torch.export.export(folded_head, (make_features(2, 16),), dynamic_shapes=dynamic_shapes)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {name for name in called if name.startswith("aten.") and "sym" not in name} == {
        "aten.conv2d.default",
        "aten.relu.default",
    }
    for num_samples, side in ((2, 16), (1, 20)):
        features = make_features(num_samples, side)
        assert_close(run(program.module(), features), run(folded_head, features))


# torch's exporter gives each level's number of samples the same name, and says so.
@pytest.mark.filterwarnings("ignore:# The axis name. samples will not be used:UserWarning")
def test_onnx(folded_head, dynamic_shapes):
    example = (make_features(2, 16),)
    program = torch.onnx.export(folded_head, example, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    assert {node.op_type for node in program.model.graph} == {"Conv", "Relu"}
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for num_samples, side in ((2, 16), (1, 20)):
        features = make_features(num_samples, side)
        inputs = {name: feature.numpy() for name, feature in zip(names, features, strict=True)}
        assert_close(session.run(None, inputs), run(folded_head, features))


BY_MINI_BATCH = {
    "ROI_BOX_HEAD": ["MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.BNEXT.ROI_BOX_HEAD.INFERENCE", "mini_batch"],
    "ROI_MASK_HEAD": ["MODEL.ROI_MASK_HEAD.NORM", "BN", "MODEL.BNEXT.ROI_MASK_HEAD.INFERENCE", "mini_batch"],
}
FASTER = {"architecture": "BNextGeneralizedRCNN"}
WITHOUT_MASKS = ["MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", False]


def make_retinanet():
    model = make_detector(row=1)
    model.test_score_thresh = 0.0
    for path, norm in find_bnext_norms(model.head).items():
        norm.spec = norm.spec.replace(inference="mini_batch" if path.startswith("cls") else "population")
    return model


def make_faster_rcnn():
    return make_model(*BY_MINI_BATCH["ROI_BOX_HEAD"], *WITHOUT_MASKS, **FASTER)


def make_mask_rcnn():
    pairs = [*BY_MINI_BATCH["ROI_BOX_HEAD"], *BY_MINI_BATCH["ROI_MASK_HEAD"], "MODEL.KEYPOINT_ON", False]
    return make_model(*pairs, "MODEL.RESNETS.NORM", "BN", **FASTER)


def make_folded_mask_rcnn():
    pairs = ["MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN", "MODEL.KEYPOINT_ON", False]
    model = make_model(*pairs, "MODEL.RESNETS.NORM", "BN", **FASTER).eval()
    assert not fold_norms(model).left
    return model


def find_instances(model, inputs):
    """As detectron2's own tool does for a trace: masks are not pasted into pictures."""
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)
    return [result["instances"] for result in model(inputs)]


@pytest.mark.parametrize(
    "make",
    [
        make_retinanet,
        pytest.param(make_faster_rcnn, marks=pytest.mark.slow),
        pytest.param(make_mask_rcnn, marks=pytest.mark.slow),
        pytest.param(make_folded_mask_rcnn, marks=pytest.mark.slow),
    ],
)
def test_a_traced_detector_finds_the_same_in_pictures_of_another_size(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripted functions, and sizes that a trace takes for numbers
        try:
            from detectron2.export import TracingAdapter
        except ModuleNotFoundError:
            pytest.skip("detectron2.export needs Caffe2 here")

        model = make().eval()
        pictures = [{"image": torch.rand(3, *size) * 255} for size in ((96, 64), (64, 128))]
        adapter = TracingAdapter(model, pictures[:1], find_instances)
        with torch.no_grad():
            traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
            (instances,) = adapter.outputs_schema(traced(pictures[1]["image"]))
            (expected,) = find_instances(model, pictures[1:])

    assert len(expected) > 0
    torch.testing.assert_close(instances.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    for name in expected.get_fields().keys() - {"pred_boxes"}:
        torch.testing.assert_close(instances.get(name), expected.get(name), rtol=1e-4, atol=1e-5)
