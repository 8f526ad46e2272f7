"""Reads of a site's parameters outside of its own forward: the reader gets them with the delta written in.

Some models do not call a layer but pass its weight to a function (a token table for the logits, a convolution in
decoding, attention's output projection). A delta on the layer's hidden values would then have no effect. So the module
at a site of a skeleton has properties in place of its parameters. While its own forward runs, they return the tensor
itself, because the delta acts on hidden values there. At any other time they return a :class:`Rewritten`, which looks
like the tensor and computes the rewritten one when an operation needs its numbers; models that only read a weight's
dtype pay nothing. The module's table ``_parameters`` is replaced in the same way, because ``parameters()``,
``state_dict()`` and ``torch.func.functional_call`` read it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import MatchError, StaleBackboneError
from ..structures.modules.structure import own_table, written_from_above
from ..transforms import is_wrapped

_GETTERS = ("dtype", "device", "shape", "ndim", "layout", "requires_grad", "is_cuda", "is_sparse", "is_quantized")
_METHODS = ("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "stride", "is_contiguous")
FACTS = {getattr(Tensor, name).__get__ for name in (*_GETTERS, "is_leaf", "is_meta", "grad", "grad_fn")}
FACTS |= {getattr(Tensor, name) for name in (*_METHODS, "__len__", "get_device")}
"""What can be asked of a tensor without reading its numbers."""

set_plainly = object.__setattr__  # nn.Module.__setattr__ would look for parameters first

MARKS = FACTS | {Tensor.requires_grad_, Tensor.requires_grad.__set__, Tensor.grad.__set__}  # pyright: ignore
"""What may be done to a stand-in without computing its numbers: asking facts and setting what autograd knows of it."""

ALIASES = {Tensor.detach, Tensor.data.__get__}  # pyright: ignore[reportAttributeAccessIssue]
"""Operations that return the same numbers in the same storage."""

IN_PLACE = frozenset(
    f"__i{name}__"
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"]
)
WRITES = frozenset(("__setitem__", "__set__", *IN_PLACE))
"""Methods that change their first argument; every other one that does ends with an underscore."""

K = TypeVar("K", bound=Tensor)


def written(kind: type[K], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> K | None:
    """The argument of class ``kind`` that the call ``func(*args, **kwargs)`` would write; ``None`` if there is none.

    >>> one = nn.Parameter(torch.ones(2))
    >>> written(nn.Parameter, Tensor.add_, (one, 1), {}) is one, written(nn.Parameter, Tensor.add, (one, 1), {})
    (True, None)
    """
    name = getattr(func, "__name__", "")
    targets: list[Any] = [kwargs.get("out")]
    if name in WRITES or (name.endswith("_") and not name.endswith("__")):
        given = [*args[1:], *kwargs.values()]
        # Setting requires_grad to False or grad to None again changes nothing.
        harmless = name in ("requires_grad_", "__set__") and all(value is None or value is False for value in given)
        targets += [] if harmless and given else [args[:1], *(kwargs.get(key) for key in ("input", "self", "tensor"))]
    return next((leaf for leaf in pytree.tree_leaves(targets) if isinstance(leaf, kind)), None)


class Rewritten(Tensor):
    """A stand-in for a parameter, which computes the rewritten one when an operation needs its numbers.

    Attributes:
        place: its name, for errors.
        same: whether it computes the parameter itself, and only records that it was read.
        owner: the id of the module, and the name under which the module has the parameter.

    >>> table = rewritten_when_read(torch.zeros(2), lambda: torch.ones(2), "0.weight")
    >>> table.dtype, torch.add(table, 1)
    (torch.float32, tensor([2., 2.]))
    """

    _compute: Callable[[], Tensor]
    place: str
    same: bool
    owner: tuple[int, str] | None = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in MARKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        wrote = written(Rewritten, func, args, kwargs or {})
        if wrote is not None and not wrote.same:
            raise StaleBackboneError(
                f"{wrote.place} was written in place by code outside of its module, but calls and views of a delta "
                f"never change the backbone. Compute with a changed copy, .clone(), or train the tensor: "
                f'unfrozen_modules=["deltas", "{wrote.place}"].'
            )
        if func in ALIASES:
            own, compute = getattr(args[0], STANDS_FOR), args[0]._compute
            return rewritten_when_read(own, lambda: compute().detach(), args[0].place, args[0].same)
        given = pytree.tree_map_only(Rewritten, lambda t: t._compute(), (args, kwargs or {}))
        return func(*given[0], **given[1])


def rewritten_when_read(tensor: Tensor, compute: Callable[[], Tensor], place: str, same: bool = False) -> Tensor:
    """A stand-in for ``tensor``, the parameter at ``place``, with the numbers of ``compute()``.

    With ``same``, ``compute()`` returns ``tensor`` itself.

    >>> rewritten_when_read(torch.zeros(3), lambda: torch.ones(3), "0.weight").shape
    torch.Size([3])
    """
    if is_wrapped(tensor):
        return compute()
    found = Tensor._make_subclass(Rewritten, tensor.detach())
    found._compute, found.place, found.same = compute, place, same
    setattr(found, STANDS_FOR, tensor)
    return found


READ = "tensors read outside of their modules"
"""The key under which a call keeps the tensors that were read so, by path and name, as their modules held them."""


def refuse_replaced(module: nn.Module, path: str, read: dict[tuple[str, str], Tensor]) -> None:
    """Raise ``MatchError`` if the module at ``path`` now holds another tensor than the one that was ``read``.

    Code that reads a weight, computes another from it and runs the site with the result, such as
    ``torch.func.functional_call``, would apply the delta twice: in the weight, and on the hidden values.
    """
    for (at, name), tensor in read.items():
        if at == path and held(module, name) is not tensor:
            raise MatchError(
                f"The model reads {path}.{name}, and {path} then runs with another tensor in its place, as with "
                f"torch.func.functional_call. What was read contains the delta already, so at {path} it would be "
                f'applied twice. Leave the site out, exclude_modules=["{path}"], or train the weight itself, '
                f'unfrozen_modules=["deltas", "{path}.{name}"].'
            )


def refuse_written(root: nn.Module, path: str) -> None:
    """Raise ``MatchError`` if the code of a module above the site at ``path`` writes into the site's tensors."""
    name = written_from_above(root, path)
    if name is not None:
        raise MatchError(
            f"The forward of a module above {path} may write {name}, as a constraint on weights does. It would do so "
            f"without the delta, which acts on hidden values there. Let the forward of {path} itself do it, or leave "
            f'the site out, exclude_modules=["{path}"].'
        )


Kinds = dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]]
"""The classes that replace modules' own, by original class, names of parameters and ``listed``."""


def watch_reads(
    module: nn.Module,
    inside: Callable[[], bool],
    outside: Callable[[str, Tensor], Tensor],
    kinds: Kinds,
    listed: bool = False,
) -> None:
    """Make reads of a parameter of ``module`` return ``outside(name, tensor)`` unless ``inside()`` is true.

    With ``listed`` this holds for its table of parameters as well. Modules of one class share one new class, kept in
    ``kinds``: Python's attribute cache is fast for a few classes only.

    >>> layer = nn.Linear(2, 2)
    >>> watch_reads(layer, lambda: False, lambda name, tensor: torch.zeros_like(tensor), {})
    >>> float(layer.weight.sum()), type(layer).__name__
    (0.0, 'Linear')
    """
    kind = type(module)
    names = tuple(name for name in own_parameters(module) if name.isidentifier())
    if (kind, names, listed) not in kinds:
        reading: dict[str, Any] = {"_parameters": _listing(), "_apply": _apply_to_own} if listed else {}
        reading |= {name: _property(name, listed) for name in names}
        about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        kinds[kind, names, listed] = type(kind.__name__, (kind,), {**about, **reading, ORIGINAL: kind})
    vars(module)[WATCHED] = inside, outside
    module.__class__ = kinds[kind, names, listed]


def _shown(module: nn.Module, name: str, tensor: Tensor, listed: bool) -> Tensor:
    """What code outside of the module gets for a parameter."""
    found = module.__dict__[WATCHED][1](name, tensor)
    if isinstance(found, Rewritten):
        found.owner = id(module), name
        # Module.get_parameter accepts other classes than Parameter by this mark.
        found._is_param = listed  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _property(name: str, listed: bool) -> property:
    def read(module: nn.Module) -> Any:
        tensor = held(module, name)
        return tensor if tensor is None or module.__dict__[WATCHED][0]() else _shown(module, name, tensor, listed)

    def write(module: nn.Module, value: Any) -> None:
        _table(module, name)[name] = put_back(module, name, value)

    def delete(module: nn.Module) -> None:
        del _table(module, name)[name]

    return property(read, write, delete)


def put_back(module: nn.Module, name: str, value: Any) -> Any:
    """What ``module`` should hold when ``value`` is assigned to ``name``: for its own stand-in, the tensor itself."""
    if isinstance(value, Rewritten) and value.owner != (id(module), name):
        return value  # another module's parameter, which this one is to compute with
    return getattr(value, STANDS_FOR, value)


class Listed(dict[str, Any]):
    """A module's table of parameters as code outside sees it; writes go into the module's own table.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> table = Listed(layer, {"weight": 2})
    >>> before, table["weight"] = table["weight"], 3
    >>> before, layer._parameters["weight"]
    (2, 3)
    """

    def __init__(self, module: nn.Module, shown: dict[str, Any]) -> None:
        super().__init__(shown)
        self._module = module

    def __setitem__(self, name: str, value: Any) -> None:
        own_table(self._module)[name] = put_back(self._module, name, value)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        del own_table(self._module)[name]
        super().__delitem__(name)

    # dict's own versions would bypass __setitem__ and __delitem__.
    pop, popitem, clear = MutableMapping.pop, MutableMapping.popitem, MutableMapping.clear
    update, setdefault = MutableMapping.update, MutableMapping.setdefault


def _listing() -> property:
    def read(module: nn.Module) -> dict[str, Any]:
        own = own_table(module)
        if module.__dict__[WATCHED][0]():
            return own
        return Listed(module, {name: t if t is None else _shown(module, name, t, True) for name, t in own.items()})

    def write(module: nn.Module, value: dict[str, Any]) -> None:
        module.__dict__["_parameters"] = value

    return property(read, write)


def _apply_to_own(module: Any, fn: Any, recurse: bool = True) -> nn.Module:
    """``module._apply(fn)`` (as in ``module.to(dtype)``) on the module's own tensors instead of their stand-ins."""
    shown = type(module)
    set_plainly(module, "__class__", vars(shown)[ORIGINAL])
    try:
        return module._apply(fn, recurse)
    finally:
        set_plainly(module, "__class__", shown)


# -- where a module holds its parameters -------------------------------------------------------------------------------

KEPT = "_funcdelta_kept"
"""Attribute of a view's module: the names of all its parameters, of which frozen ones are plain attributes."""

WATCHED = "_funcdelta_watched"
"""Attribute of a watched module: its functions ``inside`` and ``outside``, see :func:`watch_reads`."""

ORIGINAL = "_funcdelta_original"
"""Attribute of a class made by :func:`watch_reads`: the module's original class."""

STANDS_FOR = "_funcdelta_stands_for"
"""Attribute of a stand-in: the tensor itself."""


def held(module: nn.Module, name: str) -> Tensor | None:
    """The parameter ``name`` that ``module`` holds: registered, or, in a view, as a plain attribute.

    >>> held(nn.Linear(2, 3), "weight").shape
    torch.Size([3, 2])
    """
    tensor = own_table(module).get(name)
    return module.__dict__.get(name) if tensor is None else tensor


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """All parameters that ``module`` itself holds, by name and in order.

    >>> list(own_parameters(nn.Linear(2, 3, bias=False)))
    ['weight']
    """
    names = module.__dict__.get(KEPT, own_table(module))
    found = {name: held(module, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _table(module: nn.Module, name: str) -> dict[str, Any]:
    """The dict of ``module`` that holds the parameter ``name``."""
    own = own_table(module)
    return own if name in own else module.__dict__
