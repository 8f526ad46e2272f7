"""The structural copy of a backbone: its module tree, sharing every parameter's storage."""

from __future__ import annotations

import copy
import types
from typing import Any

from torch import Tensor, nn

from .code import reach_of, reach_of_functions
from .references import every_module, held_tensors, rewire

COMPILED_MODULE = "torch._dynamo.eval_frame.OptimizedModule"
"""The class that ``torch.compile(module)`` returns, by name because importing it takes as long as importing torch."""


def copy_structure(backbone: nn.Module, trains: bool = False) -> nn.Module:
    """A deep copy that shares every parameter's storage; tied parameters stay tied, and buffers are copied.

    Nothing in it requires grad, unless ``trains`` is true; then the same parameters do as in the backbone. Compiled
    modules run eagerly in it, and forwards that write into parameters (``max_norm``, a constraint on ``weight.data``)
    write into copies of them.

    >>> backbone = nn.Sequential(nn.Linear(2, 2))
    >>> copied = copy_structure(backbone)
    >>> copied[0].weight is backbone[0].weight, copied[0].weight.data_ptr() == backbone[0].weight.data_ptr()
    (False, True)
    """
    memo: dict[int, Any] = {}

    def alias(parameter: nn.Parameter) -> None:
        if id(parameter) not in memo:
            # Subclasses (quantised tensors) carry state that an alias would lose.
            plain = type(parameter) is nn.Parameter
            needs = trains and parameter.requires_grad
            memo[id(parameter)] = nn.Parameter(parameter.detach(), needs) if plain else parameter

    for module in every_module(backbone):
        for value in (*module._parameters.values(), *held_tensors(module)):
            if isinstance(value, nn.Parameter):
                alias(value)
    copied = copy_module(backbone, memo)
    for module in every_module(copied):
        names = written_parameters(module)
        if names:
            _run_on_copies(module, names)
        if COMPILED_MODULE in (f"{base.__module__}.{base.__name__}" for base in type(module).__mro__):
            vars(module)["forward"] = module._modules["_orig_mod"].__call__  # pyright: ignore[reportOptionalMemberAccess]
    return copied


def copy_module(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy without references to the original, even if ``module`` keeps computed tensors (old ``weight_norm``).

    Forwards that are closures, hooks, partial functions and weak references then refer to the copy's modules. ``memo``
    is that of ``copy.deepcopy``.

    >>> layer = nn.Linear(2, 2)
    >>> layer.last = layer(torch.zeros(1, 2))  # copy.deepcopy(layer) raises
    >>> copy_module(layer).last.shape
    torch.Size([1, 2])
    """
    memo = {} if memo is None else memo
    for child in every_module(module):
        for value in held_tensors(child):
            if not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:
        path = _uncopyable(module)
        error.add_note(f"funcdelta: the backbone's structure cannot be copied because of the attributes of {path}.")
        raise
    rewire(copied, memo)
    return copied


def written_parameters(module: nn.Module) -> list[str]:
    """The parameters, by names relative to ``module``, that its own forward may write into, judging by its code.

    >>> class Constrained(nn.Linear):
    ...     def forward(self, x):
    ...         self.weight.data.clamp_(min=0)
    ...         return super().forward(x)
    >>> written_parameters(Constrained(2, 2)), written_parameters(nn.Linear(2, 2))
    (['weight'], [])
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return ["weight"]
    held = vars(module)
    found = [reach_of_functions([held["forward"]])] if "forward" in held else []
    if not type(module).__module__.startswith("torch."):
        found.append(reach_of(frozenset([type(module)])))
    named = dict(module.named_parameters(remove_duplicate=False))
    names = list(named)
    own = {name.rpartition(".")[2] for name in names}
    written = {one for one in own for reach in found if reach.in_place(one)}
    unsafe = any(reach.writes_tensors for reach in found)
    if unsafe:
        written |= {one for one in own for reach in found if (one, "data") in reach.pairs} or own
    read = {name for reach in found for name in reach.reads}
    # A loop over all parameters names none of them.
    listed = unsafe and not {"parameters", "named_parameters", "_parameters"}.isdisjoint(read)
    tokens = {token for path, _ in module.named_modules() for token in path.split(".")} | {"self"}
    pairs = {pair for reach in found for pair in reach.pairs}
    chosen = {
        id(tensor)
        for name, tensor in named.items()
        if listed
        or (name.rpartition(".")[2] in written and _is_named(name, read) and _is_read(name, read, pairs, tokens))
    }
    return [name for name, tensor in named.items() if id(tensor) in chosen]  # with all names of a tied tensor


def written_from_above(root: nn.Module, path: str) -> str | None:
    """The parameter of the module at ``path`` that a containing module may write into; ``root`` is a structural copy.

    >>> class Constrained(nn.Sequential):
    ...     def forward(self, x):
    ...         for layer in self:
    ...             layer.weight.data.clamp_(min=0)
    ...         return super().forward(x)
    >>> written_from_above(copy_structure(Constrained(nn.Linear(2, 2))), "0")
    '0.weight'
    """
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        names, _ = vars(root.get_submodule(".".join(parts[:depth]))).get(COPIED, ((), None))
        inside = ".".join(parts[depth:])
        for name in names:
            if name.rpartition(".")[0] == inside:
                return ".".join([*parts[:depth], name])
    return None


def _is_named(name: str, read: set[str]) -> bool:
    """Whether all parts of a dotted name are read, except numbers."""
    return all(part in read or part.isdigit() for part in name.split("."))


BY_OTHER_WAYS = frozenset(("getattr", "get_parameter", "_parameters", "state_dict", "vars", "__dict__"))
"""Names by which a forward may read a parameter other than as an attribute."""


def _is_read(name: str, read: set[str], pairs: set[tuple[str, str]], tokens: set[str]) -> bool:
    """Whether a parameter may be read, judging by the names that it is read from; ``tokens`` are names of modules.

    Of ``a.weight`` and ``b.weight``, the code ``self.b.weight`` reads one; a read from a local variable may be either.

    >>> pairs = {("self", "b"), ("b", "weight")}
    >>> _is_read("a.weight", set(), pairs, {"a", "b", "self"}), _is_read("b.weight", set(), pairs, {"a", "b", "self"})
    (False, True)
    """
    *path, own = name.split(".")
    owners = {owner for owner, read_name in pairs if read_name == own}
    inside = set(path) or {"self"}
    return not owners or not BY_OTHER_WAYS.isdisjoint(read) or bool(owners & inside) or not owners <= tokens


def _run_on_copies(module: nn.Module, names: list[str]) -> None:
    """Make a forward that writes into parameters write into copies, which are made anew in each call."""
    vars(module)[COPIED] = names, vars(module).get("forward")
    # A bound method, which copies of the module rebind to themselves.
    module.forward = types.MethodType(_forward_on_copies, module)


COPIED = "_funcdelta_copied"
"""Attribute with the names of the parameters that a module's forward writes into, and the instance's own forward."""


def _forward_on_copies(module: Any, *args: Any, **kwargs: Any) -> Any:
    names, forward = vars(module)[COPIED]
    before: list[tuple[Any, str, Any]] = []
    made: dict[int, Any] = {}
    for name in names:
        path, _, own = name.rpartition(".")
        owner = module.get_submodule(path)
        # In a view, frozen parameters are plain attributes.
        table = own_table(owner) if own in own_table(owner) else vars(owner)
        tensor = table.get(own)
        if isinstance(tensor, Tensor):
            before.append((table, own, tensor))
            table[own] = made.setdefault(id(tensor), tensor.clone())
    try:
        return forward(*args, **kwargs) if forward is not None else type(module).forward(module, *args, **kwargs)
    finally:
        for table, own, tensor in before:
            table[own] = tensor


def own_table(module: nn.Module) -> dict[str, Any]:
    """The real table of parameters of ``module``, which may show others a different one (:mod:`funcdelta.run.reading`).

    >>> list(own_table(nn.Linear(2, 3)))
    ['weight', 'bias']
    """
    own = vars(module).get("_parameters")
    return own if isinstance(own, dict) else module._parameters  # TorchScript makes its table on access


def is_quantised(tensor: Tensor) -> bool:
    """Whether ``tensor`` is of a subclass whose stored numbers are not its values.

    True for quantised weights (torchao's, bitsandbytes'), but not for a tensor sharded over processes.

    >>> is_quantised(nn.Parameter(Tensor([1.0])))
    False
    """
    return type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) and not hasattr(tensor, "full_tensor")


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer, under all of its names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _uncopyable(backbone: nn.Module) -> str:
    """The path of the innermost module that ``copy.deepcopy`` refuses."""
    found = "the backbone itself"
    for path, module in backbone.named_modules():
        try:
            copy.deepcopy({key: value for key, value in vars(module).items() if key != "_modules"})
        except Exception:  # any failure means that this one cannot be copied
            found = f"{path or 'the backbone itself'} ({type(module).__name__})"
    return found


def forget_batch_statistics(module: nn.Module) -> None:
    """Stop batch norms in training mode from keeping running statistics, because a call must leave no trace."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._NormBase) and child.training and child.track_running_stats:
            child.track_running_stats = False
            child.running_mean = child.running_var = child.num_batches_tracked = None
