"""Modes and transforms of torch around a norm: it works in them as torch's does, and is the same norm afterwards."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from bnext import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.errors import StatisticsError
from tests.cases import CASES, NUM_CHANNELS, make_case, pick_cases

every_case = pytest.mark.parametrize("case", CASES)
some_cases = pytest.mark.parametrize("case", pick_cases("ghost2", "renorm", "domains-mixed", "levels-row1"))
both_modes = pytest.mark.parametrize("training", [True, False])
EXACT = {"rtol": 1e-9, "atol": 1e-9}

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")


def cube(outputs):
    return sum(output.pow(3).sum() for output in outputs.values())


def state_of(norm):
    return {key: value.detach().clone() for key, value in norm.state_dict().items()}


def call_with(case, norm, state, inputs):
    """The norm as a function of its state and its inputs; it moves a copy of the state."""
    state = {key: value.clone() for key, value in state.items()}
    with case.scope(max(map(len, inputs.values()))):
        if case.levels:
            return functional_call(norm, state, (inputs,))
        return {"x": functional_call(norm, state, (inputs["x"],))}


def differentiate(case, training, norm=None, device=None):
    """Outputs, the gradients of the inputs, and the buffers afterwards."""
    norm = (norm or case.build().to(device)).train(training)
    inputs = {name: x.to(device).requires_grad_() for name, x in case.inputs().items()}
    outputs = case.call(norm, inputs)
    gradients = torch.autograd.grad(cube(outputs), list(inputs.values()))
    return outputs, dict(zip(inputs, gradients, strict=True)), dict(norm.named_buffers())


def assert_is_itself(case, training):
    """Nothing that was made in a mode is left in the process."""
    for tensors in differentiate(case, training):
        assert {type(tensor) for tensor in tensors.values()} <= {torch.Tensor}
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


# ---- shapes without numbers


def build_without_numbers(case):
    norm = (
        LevelBatchNorm2d(NUM_CHANNELS, case.levels, case.spec) if case.levels else BatchNorm2d(NUM_CHANNELS, case.spec)
    )
    for module in norm.modules():  # not norm.double(), which would swap tensors
        for name, tensor in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(tensor.double(), tensor.requires_grad)
        for name, tensor in module.named_buffers(recurse=False):
            module._buffers[name] = tensor.double() if tensor.is_floating_point() else tensor
    return norm


@every_case
@both_modes
def test_fake_tensors_have_the_shapes_of_real_ones(case, training):
    with FakeTensorMode():
        fake = differentiate(case, training, build_without_numbers(case))
    for tensors, right in zip(fake, differentiate(case, training), strict=True):
        assert {key: value.shape for key, value in tensors.items()} == {
            key: value.shape for key, value in right.items()
        }
    assert_is_itself(case, training)


@some_cases
@both_modes
def test_fake_tensors_of_a_norm_whose_own_are_real(case, training):
    norm = case.build().train(training)
    with FakeTensorMode(allow_non_fake_inputs=True):
        outputs = case.call(norm, case.inputs())
    assert {name: x.shape for name, x in outputs.items()} == {name: x.shape for name, x in case.inputs().items()}
    assert_is_itself(case, training)


@every_case
@both_modes
def test_on_the_meta_device(case, training):
    outputs, gradients, buffers = differentiate(case, training, device="meta")
    assert all(tensor.is_meta for tensors in (outputs, gradients, buffers) for tensor in tensors.values())
    assert {name: x.shape for name, x in outputs.items()} == {name: x.shape for name, x in case.inputs().items()}


@some_cases
def test_fake_tensors_of_another_thread_stay_there(case):
    def run():
        with FakeTensorMode():
            case.call(build_without_numbers(case), case.inputs())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert_is_itself(case, training=True)


# ---- modes in which numbers are computed


class Watching(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@some_cases
@both_modes
@pytest.mark.parametrize(
    "mode",
    [lambda: FlopCounterMode(display=False), lambda: torch.device("meta"), Watching],
    ids=["flops", "device", "f"],
)
def test_in_a_mode_the_numbers_are_the_same(case, training, mode):
    expected = differentiate(case, training)
    inputs = {name: x.requires_grad_() for name, x in case.inputs().items()}
    norm = case.build().train(training)
    with mode():
        outputs = case.call(norm, inputs)
    cube(outputs).backward()
    torch.testing.assert_close(outputs, expected[0], **EXACT)
    torch.testing.assert_close({name: x.grad for name, x in inputs.items()}, expected[1], **EXACT)
    torch.testing.assert_close(dict(norm.named_buffers()), expected[2], **EXACT)


@some_cases
@both_modes
@pytest.mark.parametrize(
    "tracing_mode", ["fake", *(pytest.param(m, marks=pytest.mark.slow) for m in ("real", "symbolic"))]
)
def test_make_fx_writes_down_the_norm(case, training, tracing_mode):
    norm = case.build().train(training)
    state, inputs = state_of(norm), case.inputs()
    graph = make_fx(lambda s, x: call_with(case, norm, s, x), tracing_mode=tracing_mode)(state, inputs)
    torch.testing.assert_close(graph(state, case.inputs(seed=3)), case.call(norm, case.inputs(seed=3)), **EXACT)
    assert_is_itself(case, training)


class AsModule(nn.Module):
    """torch.export takes positional tensors."""

    def __init__(self, case, norm):
        super().__init__()
        self.case, self.norm = case, norm

    def forward(self, *features):
        return tuple(self.case.call(self.norm, dict(zip(self.case.names, features, strict=True))).values())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(make_case({"average": "cumulative", "normalization_batch_size": 2}), id="cumulative_ghost2"),
        *(pytest.param(*case.values, marks=pytest.mark.slow) for case in pick_cases("ghost2", "renorm", "levels-row1")),
    ],
)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_training_moves_the_statistics(case, strict):
    outputs, _, buffers = differentiate(case, training=True)
    program = torch.export.export(AsModule(case, case.build().train()), tuple(case.inputs().values()), strict=strict)
    module = program.module()
    torch.testing.assert_close(module(*case.inputs().values()), tuple(outputs.values()), **EXACT)
    moved = dict(module.named_buffers())
    for name, buffer in buffers.items():
        torch.testing.assert_close(moved[f"norm.{name}"], buffer, **EXACT)


# ---- transforms


@every_case
@both_modes
def test_functional_call_is_the_norm_with_that_state(case, training):
    outputs, _, _ = differentiate(case, training)
    other = case.build(seed=9).train(training)
    before = state_of(other)
    torch.testing.assert_close(call_with(case, other, case.build().state_dict(), case.inputs()), outputs, **EXACT)
    torch.testing.assert_close(state_of(other), before, rtol=0, atol=0)


@every_case
@both_modes
def test_grad_is_the_gradient(case, training):
    norm = case.build().train(training)
    gradients = grad(lambda s, x: cube(call_with(case, norm, s, x)), argnums=1)(state_of(norm), case.inputs())
    torch.testing.assert_close(gradients, differentiate(case, training)[1], **EXACT)


@some_cases
@both_modes
def test_forward_mode_is_the_directional_derivative(case, training):
    norm = case.build().train(training)
    state, inputs, tangents = state_of(norm), case.inputs(), case.inputs(seed=5)
    _, slope = jvp(lambda x: call_with(case, norm, state, x), (inputs,), (tangents,))

    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x, tangents[name]) for name, x in inputs.items()}
        outputs = call_with(case, norm, state, duals)
        also = {name: forward_ad.unpack_dual(output).tangent for name, output in outputs.items()}
    torch.testing.assert_close(also, slope, **EXACT)

    if case.spec.training != "renorm" or not training:  # whose corrections are constants to a derivative
        ends = [{name: x + sign * 1e-6 * tangents[name] for name, x in inputs.items()} for sign in (1, -1)]
        up, down = (call_with(case, norm, state, end) for end in ends)
        numeric = {name: (up[name] - down[name]) / 2e-6 for name in up}
        torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-5)


@some_cases
def test_second_derivatives(case):
    norm = case.build().train()
    state, name, inputs = state_of(norm), case.names[0], case.inputs()

    def loss(x):
        return cube(call_with(case, norm, state, {**inputs, name: x}))

    def slope(x):
        return (grad(loss)(x) * direction).sum()

    x = inputs[name][:, :, :2, :1]
    direction = torch.ones_like(x)
    matrix = hessian(loss)(x).flatten(x.dim()).flatten(0, x.dim() - 1)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(matrix.sum(1).view_as(x), grad(slope)(x), rtol=1e-6, atol=1e-6)


@every_case
@both_modes
def test_an_ensemble_by_vmap(case, training):
    norms = [case.build(seed=seed).train(training) for seed in (1, 2, 3)]
    if not norms[0].state_dict():
        return  # nothing to stack
    with torch.no_grad():
        parameters, buffers = stack_module_state(norms)
        base, inputs = copy.deepcopy(norms[0]).to("meta"), case.inputs()
        outputs = vmap(lambda p, b: call_with(case, base, {**p, **b}, inputs))(parameters, buffers)
    for index, norm in enumerate(norms):
        one = {name: output[index] for name, output in outputs.items()}
        torch.testing.assert_close(one, case.call(norm, case.inputs()), **EXACT)


@some_cases
@both_modes
def test_batches_by_vmap(case, training):
    norm = case.build().train(training)
    batches = [case.inputs(seed=seed) for seed in range(2)]
    stacked = {name: torch.stack([batch[name] for batch in batches]) for name in case.names}
    states = {key: torch.stack([value] * 2) for key, value in state_of(norm).items()}

    if states and training:
        outputs = vmap(lambda s, x: call_with(case, norm, s, x))(states, stacked)
    else:
        outputs = vmap(lambda x: call_with(case, norm, norm.state_dict(), x))(stacked)
    for index, batch in enumerate(batches):
        one = {name: output[index] for name, output in outputs.items()}
        torch.testing.assert_close(one, case.call(case.build().train(training), batch), **EXACT)


@pytest.mark.parametrize("spec", [NormSpec(), NormSpec(normalization_batch_size=2)])
def test_a_transform_does_not_move_the_norms_own_statistics(spec):
    norm = BatchNorm2d(3, spec)
    with pytest.raises(StatisticsError, match="functional_call"):
        grad(lambda x: norm(x).sum())(torch.randn(4, 3, 2, 2))
    assert not norm.running_mean.any()
    assert int(norm.num_batches_tracked) == 0
    torch.func.replace_all_batch_norm_modules_(norm)
    assert grad(lambda x: norm(x).pow(3).sum())(torch.randn(4, 3, 2, 2)).any()


@some_cases
@both_modes
def test_training_after_inference_mode(case, training):
    norm = case.build()
    with torch.inference_mode():
        case.call(norm.train(training), case.inputs())
        built_in_it = case.build().train(training)
        case.call(built_in_it, case.inputs())
    cube(case.call(norm.train(), case.inputs(requires_grad=True))).backward()
    assert_is_itself(case, training)
