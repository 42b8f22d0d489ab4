"""Fields under torch's names that each level or domain of a norm owns, as other people's code meets them on the norm.

Such code takes a norm for torch's: it fills `weight` at the start of a training, sets `running_mean` anew, or reads
both to fold the norm, freeze it or rebuild it as another. The first two mean every level or domain; for the third no
single tensor would be right.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partialmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bnext.errors import BNextError, Refusal, StatisticsError

if TYPE_CHECKING:
    from typing_extensions import Never

__all__ = ["OwnedField"]

NO_SINGLE_FIELD = Refusal(
    StatisticsError,
    "{name} of a norm",
    "be read from the levels or domains that own one each, {owners}",
    "Use bnext's fold_norms to fold the norm, freeze_norms to freeze it, convert_norm to make another of it, "
    "recompute_population_statistics to estimate it; or read norm.{first}.{name}.",
)

_ASSIGNMENTS = (nn.Module.__setattr__.__code__, nn.Module.register_buffer.__code__)
_DESCRIPTION = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_meta", "size", "dim", "numel")


class _Protocol:
    """`__torch_function__` for whoever calls torch with a field; none for a module that would hold it as a buffer."""

    def __get__(self, field: OwnedField | None, kind: type[OwnedField]) -> Callable[..., Any]:
        if field is not None and sys._getframe(1).f_code in _ASSIGNMENTS:
            raise field._refuse()
        return kind._answer


class OwnedField:
    """A field of all levels or domains at once: to be written in place, described, or imitated, but not to be read.

    Args:
        where: the norm, for the error.
        name: of the field.
        tensors: owner -> its own, all of the same shape and type; none: it is somebody else's, and nothing is written.
        like: a tensor of that shape and type.

    Example:
        >>> import torch
        >>> mine, yours = torch.zeros(2), torch.zeros(2)
        >>> field = OwnedField("norm", "weight", {"day": mine, "night": yours}, like=mine)
        >>> torch.nn.init.ones_(field) is field
        True
        >>> mine, yours
        (tensor([1., 1.]), tensor([1., 1.]))
    """

    __slots__ = ("_like", "_name", "_tensors", "_where")

    def __init__(self, where: str, name: str, tensors: dict[str, Tensor], like: Tensor) -> None:
        for attribute, value in (("_where", where), ("_name", name), ("_tensors", tensors), ("_like", like)):
            object.__setattr__(self, attribute, value)

    def __repr__(self) -> str:
        return f"{self._name} of each of {tuple(self._tensors)} ({self._where})"

    def __getattr__(self, attribute: str) -> Any:
        if attribute in _DESCRIPTION:
            return getattr(self._like, attribute)
        if attribute == "data" and self._name in ("weight", "bias"):
            tensors = {owner: tensor.data for owner, tensor in self._tensors.items()}
            return OwnedField(self._where, self._name, tensors, self._like)
        if _is_in_place(attribute):
            return lambda *args, **kwargs: self._call_each(getattr(Tensor, attribute), (self, *args), kwargs)

        # torch asks a thing for its name only to say that it cannot be assigned to a field.
        if attribute.startswith("__") and attribute != "__qualname__":
            raise AttributeError(attribute)
        raise self._refuse()

    def __setattr__(self, attribute: str, value: object) -> None:
        if attribute != "requires_grad":
            raise self._refuse()
        for tensor in self._tensors.values():
            tensor.requires_grad = bool(value)

    __torch_function__ = _Protocol()

    @classmethod
    def _answer(cls, function: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        field = next(value for value in (*args, *kwargs.values()) if isinstance(value, cls))

        if name.endswith("_like"):
            return function(*(arg._like if isinstance(arg, cls) else arg for arg in args), **kwargs)
        if _is_in_place(name):
            return field._call_each(function, args, kwargs)
        raise field._refuse()

    def _call_each(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> OwnedField:
        for owner in self._tensors:
            named = dict(zip(kwargs, _take(owner, list(kwargs.values())), strict=True))
            function(*_take(owner, args), **named)
        return self

    def _calculate(self, other: Any, name: str) -> OwnedField:
        return self._call_each(getattr(Tensor, name), (self, other), {})

    __iadd__ = partialmethod(_calculate, name="add_")
    __isub__ = partialmethod(_calculate, name="sub_")
    __imul__ = partialmethod(_calculate, name="mul_")
    __itruediv__ = partialmethod(_calculate, name="div_")

    def _refuse(self) -> BNextError:
        owners = tuple(self._tensors) or ("its owner",)
        return NO_SINGLE_FIELD.of("a read of all at once", self._where, name=self._name, owners=owners, first=owners[0])

    def _raise(self, *args: object) -> Never:
        raise self._refuse()


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    setattr(OwnedField, f"__{_name}__", OwnedField._raise)
    setattr(OwnedField, f"__r{_name}__", OwnedField._raise)
for _name in ("neg", "abs", "getitem", "setitem", "len", "iter", "float", "int", "lt", "gt", "le", "ge"):
    setattr(OwnedField, f"__{_name}__", OwnedField._raise)


def _is_in_place(name: str) -> bool:
    """By torch's names: `fill_`, `requires_grad_`, `nn.init.constant_`."""
    return name.endswith("_") and not name.startswith("_")


def _take(owner: str, values: Sequence[Any]) -> list[Any]:
    """The values, with an owner's tensor for every field."""
    return [value._tensors[owner] if isinstance(value, OwnedField) else value for value in values]
