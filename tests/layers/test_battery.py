"""What every norm must stand, whatever it computes: all cases of cases.py, one property after another."""

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext.scope import frozen_statistics
from tests.cases import CASES, NUM_CHANNELS, Case

pytestmark = pytest.mark.parametrize("case", CASES)
both_modes = pytest.mark.parametrize("training", [True, False])
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def state_of(norm):
    return {key: value.clone() for key, value in norm.state_dict().items()}


def assert_equal_state(norm, state):
    assert norm.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in norm.state_dict().items())


def assert_equal_outputs(actual, expected):
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in actual)


def assert_close_outputs(actual, expected, rtol, atol):
    torch.testing.assert_close({k: x.float() for k, x in actual.items()}, expected, rtol=rtol, atol=atol)


def loss_of(outputs):
    return sum(output.float().pow(3).sum() for output in outputs.values())


def step(case, norm, inputs):
    """Outputs and gradients of one training step."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = case.call(norm, inputs)
    loss_of(outputs).backward()
    return outputs, [x.grad for x in inputs.values()] + [p.grad for p in norm.parameters()]


def test_state_dict_round_trip_is_strict_and_exact(case):
    norm, other = case.build(seed=1), case.build(seed=2)
    other.load_state_dict(norm.state_dict(), strict=True)
    for training in (False, True):
        assert_equal_outputs(
            case.call(norm.train(training), case.inputs()), case.call(other.train(training), case.inputs())
        )
    assert_equal_state(other, norm.state_dict())


def test_copies_are_equal_and_independent(case):
    norm = case.build().train()
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert (twin.spec, twin.domains, twin.path) == (norm.spec, norm.domains, norm.path)
        assert_equal_state(twin, norm.state_dict())
        before = state_of(norm)
        step(case, twin, case.inputs())
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert_equal_state(norm, before)


@both_modes
def test_train_moves_the_buffers_that_it_should_and_eval_none(case, training):
    norm = case.build().train(training)
    assert all(module.training == training for module in norm.modules())
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    case.call(norm, case.inputs())
    moved = {name for name, buffer in norm.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == (case.moving_buffers(norm) if training else set())


def test_exactly_the_used_parameters_get_a_gradient(case):
    norm = case.build().train()
    step(case, norm, case.inputs())
    used = {id(parameter) for parameter in case.used_parameters(norm)}
    for name, parameter in norm.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == (id(parameter) in used), name
        assert parameter.requires_grad == (not case.spec.has_frozen_affine)


@both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_with_float32_state(case, dtype, training):
    norm, wide = (case.build(torch.float32).train(training) for _ in range(2))
    inputs = case.inputs(dtype=dtype)
    outputs, gradients = step(case, norm, inputs)
    expected, expected_gradients = step(case, wide, {name: x.float() for name, x in inputs.items()})
    assert {output.dtype for output in outputs.values()} == {dtype}
    digit = 4 * torch.finfo(dtype).eps
    assert_close_outputs(outputs, expected, digit, digit)
    # The loss' gradient is rounded with the outputs, by a digit of its largest values.
    for actual, right in zip(gradients, expected_gradients, strict=True):
        if actual is None or right is None:  # a domain without samples: nothing, or zeros
            assert all(gradient is None or not gradient.any() for gradient in (actual, right))
            continue
        torch.testing.assert_close(actual.float(), right, rtol=0, atol=float(8 * digit * right.abs().max() + digit))
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(value, wide.state_dict()[key], rtol=1e-5, atol=1e-5)


@both_modes
def test_a_norm_that_is_half_itself(case, training):
    for dtype in (torch.float16, torch.bfloat16):
        norm = case.build(torch.float32).to(dtype).train(training)
        outputs, gradients = step(case, norm, case.inputs(dtype=dtype))
        gradients = [gradient for gradient in gradients if gradient is not None]
        assert {tensor.dtype for tensor in [*outputs.values(), *gradients]} == {dtype}
        assert all(torch.isfinite(tensor).all() for tensor in [*outputs.values(), *gradients, *norm.buffers()])
        expected = case.call(case.build(torch.float32).train(training), case.inputs(dtype=torch.float32))
        assert_close_outputs(outputs, expected, 0.05, 0.1)


@both_modes
def test_under_autocast_after_a_convolution(case, training):
    conv = nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1)
    norm = case.build(torch.float32).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = {name: conv(x) for name, x in case.inputs(dtype=torch.float32).items()}
        outputs = case.call(norm, half)
        loss = sum(output.float().square().mean() for output in outputs.values())
    loss.backward()
    assert {x.dtype for x in half.values()} == {output.dtype for output in outputs.values()} == {torch.bfloat16}
    assert {p.grad.dtype for p in [*case.used_parameters(norm), *conv.parameters()]} == {torch.float32}
    wide = {name: x.detach().float() for name, x in half.items()}
    expected = case.call(case.build(torch.float32).train(training), wide)
    assert_close_outputs(outputs, expected, 0.02, 0.02)


@both_modes
def test_channels_last_stays_channels_last(case, training):
    norm = case.build().train(training)
    inputs = {name: x.contiguous(memory_format=torch.channels_last) for name, x in case.inputs().items()}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    outputs = case.call(norm, inputs)
    grads = [torch.randn_like(output) for output in outputs.values()]
    wanted = [*inputs.values(), *case.used_parameters(norm)]
    gradients = torch.autograd.grad(list(outputs.values()), wanted, grads)
    for index, (name, x) in enumerate(inputs.items()):
        assert outputs[name].stride() == gradients[index].stride() == x.stride()
    plain, same = case.build().train(training), case.inputs(requires_grad=True)
    expected = case.call(plain, same)
    torch.testing.assert_close(outputs, expected, **EXACT)
    right = torch.autograd.grad(list(expected.values()), [*same.values(), *case.used_parameters(plain)], grads)
    torch.testing.assert_close(gradients, right, **EXACT)
    torch.testing.assert_close(dict(norm.state_dict()), dict(plain.state_dict()), **EXACT)


@both_modes
def test_inputs_are_never_changed_in_place(case, training):
    norm = case.build().train(training)
    inputs = case.inputs()
    outputs = case.call(norm, inputs)
    assert_equal_outputs(inputs, case.inputs())
    assert all(outputs[name].data_ptr() != inputs[name].data_ptr() for name in case.names)


def test_a_later_in_place_relu_is_allowed(case):
    gradients = []
    for relu in (torch.relu_, torch.relu):
        inputs = case.inputs(requires_grad=True)
        outputs = case.call(case.build().train(), inputs)
        sum(relu(output).square().sum() for output in outputs.values()).backward()
        gradients.append([x.grad for x in inputs.values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def run_checkpointed(case, norm, inputs, use_reentrant):
    def call(*tensors):
        return tuple(case.call(norm, dict(zip(case.names, tensors, strict=True))).values())

    return dict(zip(case.names, checkpoint(call, *inputs.values(), use_reentrant=use_reentrant), strict=True))


def backward_by_fixed_gradients(case, norm, call):
    inputs = case.inputs(requires_grad=True)
    outputs = call(case, norm, inputs)
    torch.autograd.backward(list(outputs.values()), list(case.inputs(seed=9).values()))
    return outputs, [x.grad for x in inputs.values()] + [p.grad for p in norm.parameters()]


@both_modes
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_moves_statistics_once(case, training, use_reentrant):
    """pytorch#96136, YOLO-Master#262: the recomputation counted as a second step."""
    norm, plain = case.build().train(training), case.build().train(training)
    expected, gradients = backward_by_fixed_gradients(case, plain, Case.call)
    outputs, actual = backward_by_fixed_gradients(case, norm, partial(run_checkpointed, use_reentrant=use_reentrant))
    assert_equal_outputs(outputs, expected)
    assert_equal_state(norm, plain.state_dict())
    if case.is_normalized_by_population:  # documented: what is computed again uses the statistics as moved
        plain.zero_grad()
        with frozen_statistics(plain):
            _, gradients = backward_by_fixed_gradients(case, plain, Case.call)
    torch.testing.assert_close(actual, gradients, rtol=0, atol=0)


def test_twice_in_one_graph(case):
    norm, inputs = case.build().train(), case.inputs(requires_grad=True)
    loss_of(case.call(norm, case.call(norm, inputs))).backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.any() for x in inputs.values())
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in case.used_parameters(norm))


@both_modes
@pytest.mark.parametrize("cut", [lambda x: x[:0], lambda x: x[:, :, :0]], ids=["no_samples", "no_positions"])
def test_nothing_in_nothing_out(case, cut, training):
    """detectron2#366, #1807, pytorch#36530: no RoIs."""
    norm = case.build().train(training)
    before = state_of(norm)
    empty = {name: cut(x).clone().requires_grad_() for name, x in case.inputs().items()}
    outputs = case.call(norm, empty)
    assert {name: output.shape for name, output in outputs.items()} == {name: x.shape for name, x in empty.items()}
    if any(output.requires_grad for output in outputs.values()):
        sum(output.sum() for output in outputs.values()).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in norm.parameters())
    assert_equal_state(norm, before)


def test_every_affine_is_a_norms_for_the_optimizer(case):
    get_params = pytest.importorskip("detectron2.solver.build").get_default_optimizer_params
    model = nn.Sequential(nn.Conv2d(3, NUM_CHANNELS, 1), case.build())
    groups = get_params(model, base_lr=0.1, weight_decay=1e-4, weight_decay_norm=0.0)
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay == {
        **dict.fromkeys(model[0].parameters(), 0.0001),
        **dict.fromkeys((p for p in model[1].parameters() if p.requires_grad), 0.0),
    }


def test_without_gradient_nothing_is_recorded(case):
    norm = case.build().train()
    with torch.no_grad():
        assert not any(output.requires_grad for output in case.call(norm, case.inputs()).values())
    norm.requires_grad_(False)
    assert not any(output.requires_grad for output in case.call(norm, case.inputs()).values())


def test_moves_to_another_type_and_device_as_a_whole(case):
    norm = case.build(torch.float32).double()
    floats = [tensor for tensor in norm.state_dict().values() if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floats} <= {torch.float64}
    meta = copy.deepcopy(norm).to("meta")
    assert {tensor.device.type for tensor in meta.state_dict().values()} <= {"meta"}
    with torch.device("meta"):
        built = type(norm)(NUM_CHANNELS, *([case.levels] if case.levels else []), case.spec)
    assert {tensor.device.type for tensor in built.state_dict().values()} <= {"meta"}
    assert built.state_dict().keys() == norm.state_dict().keys()


def test_state_dict_has_torchs_names_by_owner(case):
    keys = {"affine": {"weight", "bias"}, "population": {"running_mean", "running_var", "num_batches_tracked"}}
    expected = set()
    for axis, names in keys.items():
        for owner in case.owners_of(getattr(case.spec, axis)):
            expected |= {f"{owner}.{name}".lstrip(".") for name in names}
    assert set(case.build().state_dict()) == expected


def test_warns_of_nothing(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(case, case.build().train(), case.inputs())
        case.call(case.build().eval(), case.inputs())


@both_modes
def test_views_are_as_good_as_copies(case, training):
    """Slices of a larger feature, and the expanded gradient of a sum."""
    results = []
    for is_view in (True, False):
        norm = case.build().train(training)
        wide = {name: torch.cat([x, x], 3).transpose(2, 3)[:, :, ::2] for name, x in case.inputs().items()}
        inputs = {name: (x if is_view else x.contiguous()).detach().requires_grad_() for name, x in wide.items()}
        outputs = case.call(norm, inputs)
        sum(output[:, :2].sum() * 3 for output in outputs.values()).backward()
        results.append(([*outputs.values()], [x.grad for x in inputs.values()], dict(norm.state_dict())))
    torch.testing.assert_close(*results, **EXACT)


def test_inference_mode(case):
    norm, plain = case.build(), case.build()
    for training in (True, False):
        with torch.inference_mode():
            outputs = case.call(norm.train(training), case.inputs())
        assert_equal_outputs(outputs, case.call(plain.train(training), case.inputs()))
    assert_equal_state(norm, plain.state_dict())
