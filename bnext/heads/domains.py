"""The domain of each image of a batch: a detector tells its norms what the records say.

    records with `domain`  --forward of the detector-->  the scope of `use_domain`, as long as that forward lasts

RoIs get the domain of their image in `bnext.heads.roi`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bnext.scope.domain import find_domains_of_batch
from bnext.scope.record import Scope, close_scopes

__all__ = ["DomainsOfImages", "tell_domains"]


class DomainsOfImages:
    """Tells the norms of a detector of which domain each image of its batch is.

    Args:
        model: is called with a list of records, as every model of Detectron2.
    """

    def __init__(self, model: nn.Module) -> None:
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, always_call=True)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = next(iter((*args, *kwargs.values())), None)
        names = find_domains_of_batch(batch)
        if names is not None:
            Scope(self, domain=names).__enter__()

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        close_scopes(self)


def tell_domains(model: nn.Module) -> None:
    """Open, in every forward of a detector, the scope of `use_domain` with the `domain` of its records.

    bnext's architectures have it done. A detector of others whose norms were given domains by `convert_norm` needs it
    once. A scope that is open already comes first; records without a domain change nothing.

    Args:
        model: is called with a list of records, as every model of Detectron2.

    Note:
        Goes with the model into its copies and pickles; state dicts do not know of it. Calling it twice changes
        nothing. Methods that are called past the forward, such as `model.inference(...)`, are not told.
    """
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    if not any(isinstance(owner, DomainsOfImages) for owner in owners):
        DomainsOfImages(model)
