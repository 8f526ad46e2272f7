"""Gradient checkpointing in the backbone: a module that is recomputed in the backward pass finds its call's state.

A checkpointed module stores no activations and runs again when its gradients are needed, long after the call has
ended. A call on a backbone that checkpoints therefore has a skeleton to itself, which keeps the call's state (params,
swapped tensors, layout) for as long as the graph of the outputs lives. Any recomputation, by any kind of checkpointing,
then finds what the first run found. Once the graph is freed, the skeleton serves the next call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import RecomputeError
from ..functional.attention import needs_mathematical_attention
from ..match import within
from ..transforms import inside_transform
from .call import Call, Host

MODULE = "torch.utils.checkpoint"

SPELLINGS = ({"torch", "utils", "checkpoint"}, {MODULE}, {"checkpoint_fn"})
"""The names in code that checkpoints: called in full, imported inside a function, or by torch's wrapper of modules."""

REQUIRE_GRADS = "make_inputs_require_grads"
"""The name of Transformers' hooks that make embeddings require grad, for checkpointing by ``use_reentrant=True``."""

FLAG, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"
"""Attributes of Transformers' modules: whether they checkpoint what they call in training, and the function for it."""


def recomputing(model: nn.Module) -> frozenset[str]:
    """Paths of the modules whose forward checkpoints something in the current mode of ``model``.

    Transformers' modules have a flag that says so; for others the code of their class is inspected.

    >>> class Checkpointed(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
    >>> sorted(recomputing(torch.nn.Sequential(torch.nn.Linear(2, 2), Checkpointed(2, 2))))
    ['1']
    """
    return frozenset(path for path, module in model.named_modules() if _checkpoints(module))


def _checkpoints(module: nn.Module) -> bool:
    flag = getattr(module, FLAG, None)
    return _code_checkpoints(type(module)) if flag is None else bool(flag) and module.training


@functools.lru_cache(maxsize=4096)
def _code_checkpoints(kind: type[nn.Module]) -> bool:
    """Whether a method of the class, or a function of the same file that it calls, calls a checkpoint function."""
    for owner in kind.__mro__:
        # Base classes of libraries contain the code that turns checkpointing on, so their names prove nothing.
        if owner.__module__.startswith(("torch.nn.", "transformers.")) or owner is object:
            continue
        seen: set[Any] = set()
        for value in vars(owner).values():
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, types.FunctionType) and _calls_checkpoint(function, seen):
                return True
    return False


def _calls_checkpoint(function: types.FunctionType, seen: set[Any]) -> bool:
    seen.add(function)
    names = set(_names(function.__code__))
    if any(spelling <= names for spelling in SPELLINGS):
        return True
    for name in names:
        found = function.__globals__.get(name)
        if MODULE in (getattr(found, "__module__", None), found.__name__ if inspect.ismodule(found) else None):
            return True
        if not isinstance(found, types.FunctionType) or found.__module__ != function.__module__:
            continue
        if found not in seen and _calls_checkpoint(found, seen):
            return True
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    """The names of all globals and attributes that the code reads, including the functions defined inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


Flags = list[tuple[dict[str, Any], Any, Any]]


def flags_of(backbone: nn.Module) -> Flags:
    """The flag and the checkpoint function of the first and the last module that can checkpoint, to notice changes.

    >>> module = torch.nn.Linear(2, 2)
    >>> module.gradient_checkpointing = False
    >>> flags_of(module)[0][1:]
    (False, None)
    """
    holders = [vars(module) for module in backbone.modules() if hasattr(module, FLAG)]
    return [(own, own.get(FLAG), own.get(FUNCTION)) for own in holders[:1] + holders[-1:]]


def needs_keeping(skeleton: Host) -> bool:
    """Whether the state of a call on ``skeleton`` has to be kept; raises where torch could not recompute the call."""
    if not skeleton.recomputing or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        raise RecomputeError(f"{_first(skeleton)} checkpoints its activations, which cannot be compiled. {TURN_OFF}")
    if inside_transform():
        # Whether others checkpoint is only guessed from their code: let torch refuse them (named_refusal).
        certain = [path for path in skeleton.recomputing if hasattr(skeleton.module.get_submodule(path), FLAG)]
        if certain:
            raise RecomputeError(_no_transform(min(certain)))
        return False
    if needs_mathematical_attention():
        raise RecomputeError(
            f"{_first(skeleton)} checkpoints its activations, and inside fd.grad.higher_order() they would be "
            f"recomputed by another kernel of attention than the one that computed them. {TURN_OFF}"
        )
    return True


@contextlib.contextmanager
def named_refusal(skeleton: Host) -> Iterator[None]:
    """A block in which torch's refusal to checkpoint inside a transform is raised as a :class:`RecomputeError`."""
    try:
        yield
    except RuntimeError as error:
        refused = "saved tensor hooks" in str(error) or "setup_context" in str(error)
        if not (refused and skeleton.recomputing and inside_transform()):
            raise
        raise RecomputeError(_no_transform(_first(skeleton))) from error


_seen = threading.local()


def note_reentrant(yes: bool) -> None:
    """Remember whether sites ran under no_grad in a call with a graph, as ``use_reentrant=True`` makes them."""
    _seen.reentrant = yes


def gradients_of(loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor]:
    """∂loss/∂leaf for each of ``leaves``, zero where the loss does not depend on it; writes into their ``.grad``.

    Reentrant checkpointing hides leaves from ``torch.autograd.grad``, which would return zeros for them.
    """
    if not getattr(_seen, "reentrant", False):
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    loss.backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


TURN_OFF = "Turn checkpointing off: backbone.activation_checkpointing_disable(), or however your model does it."


def _first(skeleton: Host) -> str:
    return min(skeleton.recomputing) or "The backbone"


def _no_transform(path: str) -> str:
    return (
        f"{path or 'The backbone'} checkpoints its activations, which torch.func and torch.vmap cannot differentiate: "
        f"torch recomputes them only in autograd's own backward pass. Write fd.value_and_grad(loss)(params, ...) or "
        f'loss.backward(), with delta.apply_many(..., engine="fold") or "loop" for several members; if you need no '
        f"gradients, call under torch.no_grad(). {TURN_OFF}"
    )


def kept_run(
    skeleton: Host, call: Call, overrides: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The output of the skeleton's module in ``call``, with ``overrides`` swapped in until its graph is freed.

    The graph of the outputs owns the call, and the skeleton refers to it weakly: activations, params and rewritten
    weights are freed together with the graph.
    """
    _check_reentrant(skeleton, call)
    restore = skeleton.swap(overrides)
    weakref.finalize(call, restore).atexit = False
    skeleton.kept = weakref.ref(call)
    skeleton.call = call
    try:
        output = skeleton.module(*args, **kwargs)
    finally:
        skeleton.call = None
        call.ended, call.reached = True, None
    for leaf in _tensors(output):
        if leaf.grad_fn is not None:
            notes: dict[Any, Any] = leaf.grad_fn.metadata  # pyright: ignore[reportAssignmentType]
            notes.setdefault("funcdelta", []).append(call)
    return output


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of an output, including those in the attributes of its objects."""
    for leaf in pytree.tree_leaves(output):
        held = [leaf] if isinstance(leaf, Tensor) else pytree.tree_leaves(dict(getattr(leaf, "__dict__", {})))
        yield from (tensor for tensor in held if isinstance(tensor, Tensor))


def _check_reentrant(skeleton: Host, call: Call) -> None:
    """Raise if reentrant checkpointing would backpropagate several times through what was computed once for all sites.

    Each checkpointed module then calls ``backward`` by itself, and the first one frees the common graph.
    """
    expanded = [s for s in skeleton.plan.shared if s.expanded and s.among(call.params)] if skeleton.plan else []
    for path in sorted(skeleton.recomputing) if expanded else []:
        function = getattr(skeleton.module.get_submodule(path), FUNCTION, None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise RecomputeError(
                f"{path} is checkpointed with use_reentrant=True, where each module runs its own backward pass through "
                f"what {expanded[0].name} computes once for all sites. Write "
                f'backbone.activation_checkpointing_enable({{"use_reentrant": False}}), or train delta.bake(params).'
            )


def check_runner(skeleton: Host, path: str) -> None:
    """Raise if a module at or below ``path`` checkpoints: that one runs under vmap, where torch cannot recompute."""
    inner = [other for other in skeleton.recomputing if within(other, path)]
    if inner and needs_keeping(skeleton):
        raise RecomputeError(
            f"{path} runs once per member, because its tensors differ by member, and {min(inner)} in it checkpoints "
            f'its activations, which torch cannot recompute under torch.vmap. Use engine="loop".'
        )


def require_grad_outside_transforms(module: nn.Module) -> None:
    """Skip, inside transforms, Transformers' hooks that call ``requires_grad_``, which transforms refuse."""
    for child in module.modules():
        for key, hook in child._forward_hooks.items():
            if getattr(hook, "__name__", "") == REQUIRE_GRADS:
                child._forward_hooks[key] = functools.partial(_outside_transforms, hook)


def _outside_transforms(hook: Callable[..., Any], module: nn.Module, args: Any, output: Any) -> Any:
    return None if inside_transform() else hook(module, args, output)
