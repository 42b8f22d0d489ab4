"""The convolution that feeds a norm, and nothing else: what folding must know of a model's structure.

The one proof is a symbolic trace of a forward, in which every submodule is one call. The forward of the module that
holds both shows that the output of a convolution goes to the norm and to nothing else; the forward of the
convolution, that its output is a convolution with its weight and bias and nothing after it. A convolution that owns
its norm (detectron2's Conv2d) shows in its own forward that it gives the norm its convolution first. Nothing is paired
by names. What cannot be traced is not guessed: it gets a reason, and the user may name the pair.

What is not here: any change of the model (see `bnext.surgery.fold`).
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bnext.errors import ConfigError, Refusal
from bnext.layers.batch_norm import DomainState
from bnext.layers.cycle_batch_norm import CycleBatchNormList
from bnext.layers.forms import find_kind
from bnext.scope.model import restoring

__all__ = ["Pair", "find_pairs"]

_NAME_IT = "if a convolution feeds it alone, name the pair in `pairs`"
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


NO_PAIR = Refusal(
    ConfigError,
    "pairs",
    "name a convolution of the model and then its norm, and each once",
    "Correct the paths; model.named_modules() lists them.",
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A convolution and the norm of its output, each with its first place in the model."""

    conv: _ConvNd
    norm: nn.Module
    conv_path: str
    norm_path: str


class _Left(Exception):
    """Why a norm is not folded."""


def _is_population_norm(module: nn.Module) -> bool:
    """Whether a module holds what a batch norm with running statistics does, or a frozen one of no class of torch."""
    if isinstance(module, DomainState):
        return False

    statistics = [getattr(module, name, None) for name in ("running_mean", "running_var")]
    holds_statistics = all(isinstance(value, Tensor) and value.dim() == 1 for value in statistics)
    is_leaf = next(module.children(), None) is None
    return isinstance(module, _BatchNorm) or (holds_statistics and hasattr(module, "eps") and is_leaf)


def find_pairs(model: nn.Module, named: Iterable[tuple[str, str]] = ()) -> tuple[list[Pair], dict[str, str]]:
    """The convolution of every norm.

    Args:
        model: is not changed; forwards of its modules are traced, not run.
        named: paths of convolution and norm that the user vouches for.

    Returns:
        The pairs, and for every other norm its path with the reason.

    Raises:
        ConfigError: a named path is not in the model, is of another kind, or is named twice.
    """
    structure = _Structure(model)
    vouched = _read_named(model, structure, named)
    pairs: list[Pair] = []
    left: dict[str, str] = {}

    with restoring(model):  # a forward may keep what it sees
        for norm, paths in structure.norms.items():
            try:
                conv = vouched.get(norm) or structure.find_conv(norm)
                _check_foldable(conv, norm)
                structure.check_convolution(conv, norm, is_vouched=norm in vouched)
                pairs.append(Pair(conv, norm, structure.convs[conv][0], paths[0]))
            except _Left as reason:
                left[paths[0]] = str(reason)

    convs = [pair.conv for pair in pairs]
    for pair in pairs:
        if convs.count(pair.conv) > 1:
            left[pair.norm_path] = f"its convolution ({pair.conv_path}) has other norms, too"
    return [pair for pair in pairs if pair.norm_path not in left], left


def _read_named(model: nn.Module, structure: _Structure, named: Iterable[tuple[str, str]]) -> dict[nn.Module, _ConvNd]:
    modules = dict(model.named_modules(remove_duplicate=False))
    vouched: dict[nn.Module, _ConvNd] = {}

    for pair in named:
        if isinstance(pair, str) or len(pair) != 2:
            raise NO_PAIR.of(pair, "fold_norms")
        conv, norm = (modules.get(path) for path in pair)
        is_new = norm in structure.norms and norm not in vouched and conv not in vouched.values()
        if norm is None or not isinstance(conv, _ConvNd) or not is_new:
            raise NO_PAIR.of(pair, "fold_norms")
        vouched[norm] = conv

    return vouched


def _check_foldable(conv: _ConvNd, norm: nn.Module) -> None:
    """Leave a norm that is more than one, and a convolution whose parameters cannot take it in."""
    channels = getattr(norm, "num_features", conv.out_channels)

    if find_kind(norm) is None:
        name = type(norm).__name__
        raise _Left(
            f"the forward of {name} is its own: it may do more, or other, than to normalize by its running "
            f"statistics (convert it with convert_norm and treat_as={{{name}: nn.BatchNorm2d}}, if it does not)"
        )
    if isinstance(norm, CycleBatchNormList) and "per_" in norm.spec.population + norm.spec.affine:
        raise _Left("it gets levels with statistics of their own one after the other, and a convolution serves one")
    if "weight" not in conv._parameters or "bias" not in conv._parameters:
        raise _Left("the weight of its convolution is computed from other parameters (parametrized or pruned)")
    for module in (conv, norm):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise _Left("hooks on it or on its convolution see, or change, what lies between the two")
    if channels != conv.out_channels:
        raise _Left(f"it has {channels} channels, its convolution {conv.out_channels}")


class _Structure:
    """Places of the norms and convolutions of a model, and the calls that its forwards make."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.norms: dict[nn.Module, list[str]] = {}
        self.convs: dict[nn.Module, list[str]] = {}
        self._calls: dict[nn.Module, _Calls] = {}

        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, _ConvNd):
                self.convs.setdefault(module, []).append(path)
            elif path and _is_population_norm(module):
                self.norms.setdefault(module, []).append(path)

    def find_conv(self, norm: nn.Module) -> _ConvNd:
        """The convolution that feeds every call of this norm, and nothing else."""
        owners = self._find_owners(self.norms[norm])
        if len(owners) > 1 and any(isinstance(owner, _ConvNd) for owner in owners):
            raise _Left("several modules use it")

        sources: list[object] = []
        for owner in owners:
            sources += self._read_calls(owner).sources.get(norm, [])
        if not sources:
            raise _Left(f"the forward of the module that holds it does not call it ({_NAME_IT})")

        conv = sources[0]
        if not isinstance(conv, _ConvNd):
            kind = f", but a {type(conv).__name__}" if isinstance(conv, nn.Module) else ""
            raise _Left(f"no convolution feeds it directly{kind}")
        if any(source is not conv for source in sources):
            raise _Left("it is used after different modules")
        if owners != [conv]:  # which is then proved by the convolution's own forward
            self._check_takers(conv, norm)
        return conv

    def _check_takers(self, conv: _ConvNd, norm: nn.Module) -> None:
        """The output of the convolution goes to the norm alone, and its weight nowhere."""
        for owner in self._find_owners(self.convs[conv] + self.norms[norm]):
            takers = self._read_calls(owner).takers.get(conv, [])
            if any(taker != (norm,) for taker in takers):
                raise _Left("the output of its convolution, or its weight, is used elsewhere, too")

    def check_convolution(self, conv: _ConvNd, norm: nn.Module, *, is_vouched: bool) -> None:
        """Leave a norm whose convolution does, in its own forward, more before it than to convolve."""
        taker = norm if any(child is norm for child in conv.children()) else "output"
        try:
            calls = self._read_calls(conv)
        except _Left:
            if is_vouched:
                return  # whoever names the pair knows what cannot be traced
            raise

        if calls.takers.get(conv) != [(taker,)]:
            raise _Left("its convolution does more before the norm than to convolve (an activation?)")

    def _find_owners(self, paths: list[str]) -> list[nn.Module]:
        """The modules whose forwards call what lies at these paths: lists and dictionaries have none."""
        owners: dict[nn.Module, None] = {}

        for path in filter(None, paths):
            owner = self.model
            while path:
                path = path.rpartition(".")[0]
                owner = self.model.get_submodule(path)
                if type(owner).forward is not nn.Module.forward:
                    break
            owners[owner] = None

        return list(owners)

    def _read_calls(self, owner: nn.Module) -> _Calls:
        if owner not in self._calls:
            self._calls[owner] = _read_calls(owner)
        return self._calls[owner]


# ---- tracing one forward


@dataclasses.dataclass
class _Calls:
    """Who feeds whom in one forward.

    Args:
        sources: module -> what feeds each of its calls. The module itself stands for its own convolution, where the
            forward is that of a convolution.
        takers: module -> what takes each of its outputs.
    """

    sources: dict[nn.Module, list[object]] = dataclasses.field(default_factory=dict)
    takers: dict[nn.Module, list[tuple[object, ...]]] = dataclasses.field(default_factory=dict)


class _CallTracer(fx.Tracer):
    """Traces one forward; whatever it calls is a single call, and features are not empty."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def to_bool(self, obj: fx.Proxy) -> bool:
        node = obj.node
        is_comparison = node.op == "call_function" and node.target is operator.eq and node.args[1] == 0
        if is_comparison and getattr(node.args[0], "target", None) == "numel":  # as detectron2's Conv2d asks
            return False
        return bool(super().to_bool(obj))


def _read_calls(owner: nn.Module) -> _Calls:
    graph = _trace(owner)
    calls = _Calls()

    for node in graph.nodes:
        module = _get_module(owner, node)
        if node.op == "get_attr":
            holder = owner.get_submodule(str(node.target).rpartition(".")[0])
            if not all(_is_convolution(user, owner) for user in node.users):
                calls.takers.setdefault(holder, []).append(("its parameter",))
        elif isinstance(module, nn.Module):
            is_plain = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
            calls.sources.setdefault(module, []).append(_get_module(owner, node.args[0]) if is_plain else None)
            calls.takers.setdefault(module, []).append(tuple(_get_module(owner, user) for user in node.users))

    return calls


def _trace(owner: nn.Module) -> fx.Graph:
    name, is_conv = type(owner).__name__, isinstance(owner, _ConvNd)
    remedy = "" if is_conv else f" ({_NAME_IT})"
    if "forward" in vars(owner):
        raise _Left(f"the forward of {name} was replaced{remedy}")

    parameters = inspect.signature(type(owner).forward).parameters.items()
    # A transposed convolution may be given the size of its output; in a model it is not.
    arguments = {key: None for key, parameter in parameters if parameter.default is None} if is_conv else {}
    try:
        return _CallTracer().trace(owner, arguments or None)
    except Exception as error:  # whatever the forward does with symbols in the place of tensors
        reason = "".join(str(error).splitlines()[:1])
        raise _Left(f"the forward of {name} cannot be traced: {type(error).__name__}: {reason}{remedy}") from error


def _is_convolution(node: fx.Node, owner: nn.Module) -> bool:
    """Whether a node of a convolution's own forward convolves with its weight and bias as they are."""
    if not isinstance(owner, _ConvNd) or node.op != "call_function" or node.target not in _CONVOLUTIONS:
        return False

    arguments: dict[str, Any] = dict(zip(("input", "weight", "bias"), node.args, strict=False))
    arguments.update(node.kwargs)
    for name in ("weight", "bias"):
        value = arguments.get(name)
        is_parameter = isinstance(value, fx.Node) and (value.op, value.target) == ("get_attr", name)
        if not is_parameter and (name == "weight" or value is not None or owner.bias is not None):
            return False
    return True


def _get_module(owner: nn.Module, node: object) -> object:
    """The module that a node of the trace calls, or whose convolution it is; otherwise what the node is."""
    if not isinstance(node, fx.Node):
        return node
    if node.op == "call_module":
        return owner.get_submodule(str(node.target))
    if _is_convolution(node, owner):
        return owner
    return "output" if node.op == "output" else node.name
