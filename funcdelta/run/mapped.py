"""What a model does in Python that ``torch.vmap`` would do for all members at once, and a loop for each.

Operations are mapped, and what torch cannot map it refuses. But a generator that a forward seeds gives every member
numbers of its own, where in a loop each gets the same, and a hook on a tensor is never called. Both are looked for when
inputs of a kind are mapped for the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import EngineError
from ..structures.modules.code import Reach

HOOKS = frozenset(("register_hook", "register_post_accumulate_grad_hook", "register_multi_grad_hook"))
"""By these names forwards have functions called in the backward pass. Mapped tensors say that they need no gradient."""

SEEDS = frozenset(("manual_seed", "fork_rng", "set_rng_state"))
"""By these names forwards seed torch's own generator, which nothing else shows."""

OTHER_ENGINES = 'Use engine="auto" or "loop".'


class Mapped(TorchFunctionMode):
    """Inside the block a call that ``torch.vmap`` would make otherwise than a loop is an ``EngineError``.

    >>> with Mapped():
    ...     torch.rand(2, generator=torch.Generator())
    Traceback (most recent call last):
    ...
    funcdelta.errors.EngineError: The model draws from a generator of its own (rand), which torch.vmap would ask once...
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, torch.Generator) and not _is_torchs(value) for value in (*args, *kwargs.values())):
            raise EngineError(
                f"The model draws from a generator of its own ({getattr(func, '__name__', 'in an operation')}), which "
                f"torch.vmap would ask once for all members. {OTHER_ENGINES}"
            )
        return func(*args, **kwargs)


def refuse_unmapped(reach: Reach, backward: bool) -> None:
    """Raise an ``EngineError`` if a forward may seed a generator or, for a ``backward`` pass, hook tensors.

    As far as its code tells.

    >>> refuse_unmapped(Reach(reads={"manual_seed"}), False)
    Traceback (most recent call last):
    ...
    funcdelta.errors.EngineError: The model seeds a generator (manual_seed), so all members draw the same numbers in...
    """
    found = SEEDS & reach.reads
    if found:
        raise EngineError(
            f"The model seeds a generator ({min(found)}), so all members draw the same numbers in a loop, and others "
            f"by torch.vmap. {OTHER_ENGINES}"
        )
    found = HOOKS & reach.reads
    if found and backward:
        raise EngineError(
            f"The model has hooks on tensors ({min(found)}) called in the backward pass, which torch.vmap leaves out. "
            f"{OTHER_ENGINES}"
        )


def _is_torchs(generator: torch.Generator) -> bool:
    return generator is torch.default_generator or generator in getattr(torch.cuda, "default_generators", ())
