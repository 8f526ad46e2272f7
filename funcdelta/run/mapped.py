"""Finds what a model does in Python that would silently come out differently under ``torch.vmap`` than in a loop.

Operations that torch cannot map raise. But a generator that a forward seeds draws different numbers for each member,
where in a loop all get the same, and a hook on a tensor is never called. Both are looked for when inputs of a kind are
mapped for the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import EngineError
from ..structures.modules.code import Reach

HOOKS = frozenset(("register_hook", "register_post_accumulate_grad_hook", "register_multi_grad_hook"))
"""Methods that install backward hooks. Tensors under vmap say that they need no gradient, so hooks never run."""

SEEDS = frozenset(("manual_seed", "fork_rng", "set_rng_state"))
"""Functions that seed torch's own generator; only the code of a forward shows such a call."""

OTHER_ENGINES = 'Use engine="auto" or "loop".'


class Mapped(TorchFunctionMode):
    """A block in which drawing from a generator of the model's own raises ``EngineError``.

    >>> with Mapped():
    ...     torch.rand(2, generator=torch.Generator())
    Traceback (most recent call last):
    ...
    funcdelta.errors.EngineError: The model draws from its own generator (rand), which torch.vmap would call once...
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, torch.Generator) and not _is_torchs(value) for value in (*args, *kwargs.values())):
            raise EngineError(
                f"The model draws from its own generator ({getattr(func, '__name__', 'in an operation')}), which "
                f"torch.vmap would call once for all members. {OTHER_ENGINES}"
            )
        return func(*args, **kwargs)


def refuse_unmapped(reach: Reach, backward: bool) -> None:
    """Raise ``EngineError`` if the code of a forward seeds a generator or, before a ``backward`` pass, hooks tensors.

    >>> refuse_unmapped(Reach(reads={"manual_seed"}), False)
    Traceback (most recent call last):
    ...
    funcdelta.errors.EngineError: The model seeds a generator (manual_seed). In a loop all members draw the same...
    """
    found = SEEDS & reach.reads
    if found:
        raise EngineError(
            f"The model seeds a generator ({min(found)}). In a loop all members draw the same numbers, under "
            f"torch.vmap different ones. {OTHER_ENGINES}"
        )
    found = HOOKS & reach.reads
    if found and backward:
        raise EngineError(
            f"The model puts backward hooks on tensors ({min(found)}), which torch.vmap would never call. "
            f"{OTHER_ENGINES}"
        )


def _is_torchs(generator: torch.Generator) -> bool:
    return generator is torch.default_generator or generator in getattr(torch.cuda, "default_generators", ())
