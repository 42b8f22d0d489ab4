"""Which convolution feeds a norm, and nothing else: what folding must know of a model's structure.

A pair is found where a convolution owns its norm (detectron2's Conv2d), and where the forward of the
module that holds both passes the output of the one to the other and to nothing else. The latter is read
from a symbolic trace of that forward, in which every submodule is one call; an nn.Sequential is the
simplest case. What cannot be traced is not guessed: it gets a reason, and the user may name the pair.

What is not here: any change of the model (see `bnext.surgery.fold`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeAlias

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bnext.errors import ConfigError
from bnext.layers.batch_norm import DomainState

__all__ = ["Conv", "Pair", "find_pairs", "is_population_norm"]

Conv: TypeAlias = _ConvNd

_NAME_IT = "if a convolution feeds it alone, name the pair in `pairs`"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A convolution and the norm of its output, with all places of the norm in the model."""

    conv: Conv
    norm: nn.Module
    conv_path: str
    norm_paths: tuple[str, ...]

    @property
    def norm_path(self) -> str:
        return self.norm_paths[0]

    @property
    def is_own(self) -> bool:
        """Whether the norm is part of the convolution's own forward."""
        return any(child is self.norm for child in self.conv.children())


def is_population_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm, also a frozen one that is none of torch's classes.

    The latter is known by what it holds, running statistics per channel and an eps; what it does with them is tried
    out before it is folded.
    """
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
    vouched = _read_named(model, structure, list(named))
    pairs, left = [], {}
    for norm, paths in structure.norms.items():
        found = vouched.get(norm) or structure.find_conv(norm)
        if not isinstance(found, str):
            found = _find_obstacle(found, norm) or found
        if isinstance(found, str):
            left[paths[0]] = found
        else:
            pairs.append(Pair(found, norm, structure.convs[found][0], tuple(paths)))
    return _drop_shared(pairs, left), left


def _read_named(model: nn.Module, structure: _Structure, named: list[tuple[str, str]]) -> dict[nn.Module, Conv]:
    vouched: dict[nn.Module, Conv] = {}
    for conv_path, norm_path in named:
        conv, norm = (_look_up(model, path) for path in (conv_path, norm_path))
        if not isinstance(conv, _ConvNd) or norm not in structure.norms:
            raise ConfigError(
                f"pairs must name a convolution and its norm; got {(conv_path, norm_path)!r}, a {type(conv).__name__} "
                f"and a {type(norm).__name__} (fold_norms). Name them in this order, by their paths in the model."
            )
        if norm in vouched or any(conv is other for other in vouched.values()):
            raise ConfigError(
                f"pairs must name every convolution and norm once; got {(conv_path, norm_path)!r} beside another pair "
                f"with one of the two (fold_norms). A convolution with several norms cannot be folded."
            )
        vouched[norm] = conv
    return vouched


def _look_up(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ConfigError(
            f"pairs must name modules of the model; got {path!r}, which {type(model).__name__} has not (fold_norms). "
            f"Correct the path; model.named_modules() lists them."
        ) from None


def _find_obstacle(conv: Conv, norm: nn.Module) -> str | None:
    """Why a convolution's parameters cannot take a norm in, or None."""
    if "weight" not in conv._parameters or "bias" not in conv._parameters:
        return "the weight of its convolution is computed from other parameters (parametrized or pruned)"
    for module in (conv, norm):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return "hooks on it or on its convolution see, or change, what lies between the two"
    channels = getattr(norm, "num_features", conv.out_channels)
    if channels != conv.out_channels:
        return f"it has {channels} channels, its convolution {conv.out_channels}"
    return None


def _drop_shared(pairs: list[Pair], left: dict[str, str]) -> list[Pair]:
    """Several norms of one convolution: none of them can be folded."""
    count = {pair.conv: sum(other.conv is pair.conv for other in pairs) for pair in pairs}
    for pair in pairs:
        if count[pair.conv] > 1:
            left[pair.norm_path] = f"its convolution ({pair.conv_path}) has other norms, too"
    return [pair for pair in pairs if count[pair.conv] == 1]


class _CallTracer(fx.Tracer):
    """Traces one forward; whatever it calls is a single call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclasses.dataclass
class _Calls:
    """Who feeds whom in one forward: what feeds each call of a norm, what takes each output of a convolution."""

    sources: dict[nn.Module, list[object]] = dataclasses.field(default_factory=dict)
    takers: dict[nn.Module, list[tuple[object, ...]]] = dataclasses.field(default_factory=dict)


class _Structure:
    """Places and calls of the norms and convolutions of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.norms: dict[nn.Module, list[str]] = {}
        self.convs: dict[nn.Module, list[str]] = {}
        self._calls: dict[nn.Module, _Calls | str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, _ConvNd):
                self.convs.setdefault(module, []).append(path)
            elif path and is_population_norm(module):
                self.norms.setdefault(module, []).append(path)

    def find_conv(self, norm: nn.Module) -> Conv | str:
        """The convolution that feeds every call of this norm and nothing else; or why there is none."""
        owners = self._find_owners(self.norms[norm])
        if any(isinstance(owner, _ConvNd) for owner in owners):
            owner = owners[0]
            return owner if isinstance(owner, _ConvNd) and len(owners) == 1 else "several modules use it"
        sources: list[object] = []
        for calls in map(self._read_calls, owners):
            if isinstance(calls, str):
                return calls
            sources += calls.sources.get(norm, [])
        if not sources:
            return f"the forward of the module that holds it does not call it ({_NAME_IT})"
        conv = sources[0]
        if not isinstance(conv, _ConvNd):
            return f"no convolution feeds it directly{_describe(conv)}"
        if any(source is not conv for source in sources):
            return "it is used after different modules"
        return self._find_other_taker(conv, norm) or conv

    def _find_other_taker(self, conv: Conv, norm: nn.Module) -> str | None:
        for calls in map(self._read_calls, self._find_owners(self.convs.get(conv, []) + self.norms[norm])):
            if isinstance(calls, str):
                return f"its convolution has a second place in the model: {calls}"
            if any(takers != (norm,) for takers in calls.takers.get(conv, [])):
                return "the output of its convolution, or its weight, is used elsewhere, too"
        return None

    def _find_owners(self, paths: list[str]) -> list[nn.Module]:
        """The modules whose forwards call what lies at these paths: lists and dictionaries have none."""
        owners: list[nn.Module] = []
        for path in filter(None, paths):
            owner = self.model
            while path:
                path = path.rpartition(".")[0]
                owner = self.model.get_submodule(path)
                if type(owner).forward is not nn.Module.forward:
                    break
            if not any(owner is other for other in owners):
                owners.append(owner)
        return owners

    def _read_calls(self, owner: nn.Module) -> _Calls | str:
        if owner not in self._calls:
            self._calls[owner] = _read_calls(owner)
        return self._calls[owner]


def _read_calls(owner: nn.Module) -> _Calls | str:
    if "forward" in vars(owner):
        return f"the forward of {type(owner).__name__} was replaced ({_NAME_IT})"
    attributes = dict(vars(owner))  # a forward may keep what it sees
    try:
        graph = _CallTracer().trace(owner)
    except Exception as error:  # whatever the forward does with symbols in the place of tensors
        reason = "".join(str(error).splitlines()[:1])
        return f"the forward of {type(owner).__name__} cannot be traced: {type(error).__name__}: {reason} ({_NAME_IT})"
    finally:
        vars(owner).clear()
        vars(owner).update(attributes)
    calls = _Calls()
    for node in graph.nodes:
        module = _get_module(owner, node)
        if node.op == "get_attr":
            holder = owner.get_submodule(str(node.target).rpartition(".")[0])
            calls.takers.setdefault(holder, []).append(("its parameter",))
        elif isinstance(module, nn.Module):
            is_plain = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
            calls.sources.setdefault(module, []).append(_get_module(owner, node.args[0]) if is_plain else None)
            calls.takers.setdefault(module, []).append(tuple(_get_module(owner, user) for user in node.users))
    return calls


def _get_module(owner: nn.Module, node: object) -> object:
    """The module that a node of the trace calls; otherwise what the node is."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return owner.get_submodule(str(node.target))
    return node.name if isinstance(node, fx.Node) else node


def _describe(source: object) -> str:
    return f", but a {type(source).__name__}" if isinstance(source, nn.Module) else ""
