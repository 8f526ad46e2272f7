"""Tensors of a site that are read outside of its own forward: they are given with the delta written into them.

A layer whose weight is passed to a function instead of being called (a table read for the logits, a convolution in
decoding, attention's output projection) would leave a delta on its hidden values without effect. So the module at a
site of a skeleton has properties in the place of its parameters. While its own forward runs, for which the formula on
hidden values holds, it has the tensor itself; at any other time whoever reads it gets :class:`Rewritten`, which looks
like the tensor and becomes the rewritten one when something is computed from it. Many models read a weight's dtype
alone, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import MatchError
from ..sites.structure import written_from_above
from ..transforms import is_wrapped

_GETTERS = ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_sparse", "is_quantized")
_METHODS = ("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "stride", "is_contiguous")
FACTS = {getattr(Tensor, name).__get__ for name in (*_GETTERS, "is_leaf", "is_meta")}
FACTS |= {getattr(Tensor, name) for name in (*_METHODS, "__len__", "get_device")}
"""What can be asked of a tensor without reading its numbers."""


class Rewritten(Tensor):
    """A parameter with a delta written into it, computed when its numbers are first needed.

    >>> table = rewritten_when_read(torch.zeros(2), lambda: torch.ones(2))
    >>> table.dtype, torch.add(table, 1)
    (torch.float32, tensor([2., 2.]))
    """

    _compute: Callable[[], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        given = pytree.tree_map_only(Rewritten, lambda t: t._compute(), (args, kwargs or {}))
        return func(*given[0], **given[1])


def rewritten_when_read(tensor: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What looks like ``tensor`` and is ``compute()`` when it is used.

    >>> rewritten_when_read(torch.zeros(3), lambda: torch.ones(3)).shape
    torch.Size([3])
    """
    if is_wrapped(tensor):
        return compute()
    found = Tensor._make_subclass(Rewritten, tensor.detach())
    found._compute = compute
    setattr(found, STANDS_FOR, tensor)
    return found


READ = "tensors read outside of their modules"
"""What a call notes of tensors that were computed with there: by path and name, as their modules held them."""


def refuse_replaced(module: nn.Module, path: str, read: dict[tuple[str, str], Tensor]) -> None:
    """Raise if the module at ``path`` now runs with another tensor than the one that was ``read`` with the delta in it.

    Whoever reads a weight, computes with it and has the site run with the result, as ``torch.func.functional_call``
    does, would have the delta twice: in the weight, and on the hidden values.

    >>> layer = nn.Linear(2, 2)
    >>> refuse_replaced(layer, "0", {("0", "weight"): layer.weight})
    """
    for (at, name), tensor in read.items():
        if at == path and held(module, name) is not tensor:
            raise MatchError(
                f"{path}.{name} is read by the model, and {path} then runs with another tensor in its place, as with "
                f"torch.func.functional_call. The delta is in what was read, so at {path} it would count twice. Leave "
                f'the site out, exclude_modules=["{path}"], or train the weight itself, '
                f'unfrozen_modules=["deltas", "{path}.{name}"].'
            )


def refuse_written(root: nn.Module, path: str) -> None:
    """Raise if a module above the site at ``path`` writes into its tensors: into which, the delta's or the site's own?

    >>> refuse_written(nn.Sequential(nn.Linear(2, 2)), "0")
    """
    name = written_from_above(root, path)
    if name is not None:
        raise MatchError(
            f"{name} may be written by the forward of a module above {path}, as a constraint on weights does. What it "
            f"wrote would lack the delta, which acts on hidden values there. Let the forward of {path} itself do it, "
            f'or leave the site out, exclude_modules=["{path}"].'
        )


Kinds = dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]]
"""The class that takes the place of a module's own, by that one and the names of the module's parameters."""


def watch_reads(
    module: nn.Module, inside: Callable[[], bool], outside: Callable[[str, Tensor], Tensor], kinds: Kinds
) -> None:
    """Let ``outside(name, tensor)`` answer whoever reads a parameter of ``module`` while it is not ``inside``.

    Modules of one class get one class together, kept in ``kinds``: Python finds the attributes of a few classes fast.

    >>> layer = nn.Linear(2, 2)
    >>> watch_reads(layer, lambda: False, lambda name, tensor: torch.zeros_like(tensor), {})
    >>> float(layer.weight.sum()), type(layer).__name__
    (0.0, 'Linear')
    """
    kind = type(module)
    names = tuple(name for name in own_parameters(module) if name.isidentifier())
    if (kind, names) not in kinds:
        namespace = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        reading = {name: _property(name) for name in names}
        kinds[kind, names] = type(kind.__name__, (kind,), {**namespace, **reading, ORIGINAL: kind})
    vars(module)[WATCHED] = inside, outside
    module.__class__ = kinds[kind, names]


def _property(name: str) -> property:
    def read(module: nn.Module) -> Any:
        tensor = held(module, name)
        inside, outside = module.__dict__[WATCHED]
        return tensor if tensor is None or inside() else outside(name, tensor)

    def write(module: nn.Module, value: Any) -> None:
        _table(module, name)[name] = getattr(value, STANDS_FOR, value)

    def delete(module: nn.Module) -> None:
        del _table(module, name)[name]

    return property(read, write, delete)


# -- where a module holds its parameters -------------------------------------------------------------------------------

KEPT = "_funcdelta_kept"
"""Where a module of a view has the names of its parameters, of which it holds the frozen ones as plain attributes."""

WATCHED = "_funcdelta_watched"
"""Where it has who answers for them: whether its own forward runs, and what everybody else is given."""

ORIGINAL = "_funcdelta_original"
"""Where a class that was made of a module's class has that one."""

STANDS_FOR = "_funcdelta_stands_for"
"""Where what is shown instead of a tensor has the tensor itself."""


def held(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``name`` that ``module`` holds: registered, or, in a view, as a plain attribute.

    >>> held(nn.Linear(2, 3), "weight").shape
    torch.Size([3, 2])
    """
    tensor = module._parameters.get(name)
    return module.__dict__.get(name) if tensor is None else tensor


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """All parameters that ``module`` itself holds, by name and in order.

    >>> list(own_parameters(nn.Linear(2, 3, bias=False)))
    ['weight']
    """
    names = module.__dict__.get(KEPT, module._parameters)
    found = {name: held(module, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _table(module: nn.Module, name: str) -> dict[str, Any]:
    """The dict of ``module`` that holds the parameter ``name``."""
    return module._parameters if name in module._parameters else module.__dict__
