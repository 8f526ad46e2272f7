"""Finds out what a layer's forward computes: from the function object, or by running a private copy.

A formula on activations holds for one forward only, so a class name, ``in_features`` or ``isinstance`` is not enough: a
subclass may scale its output, pad its input or return a tuple. Torch's own forwards are recognised by the function
object. For other classes a copy runs on random inputs, including large ones, and in both modes, because that is where
clipped, gated and noisy layers differ from a linear one.
"""

from __future__ import annotations

import contextlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from ...randomness import ThreadMode
from ...transforms import outside_transforms
from .references import COMPILED
from .structure import copy_structure

Forward = Callable[..., Any]

LAYERS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.Linear: ("linear", ()),
    nn.Embedding: ("embedding", ()),
    nn.Conv1d: ("conv1d", ("_conv_forward",)),
    nn.Conv2d: ("conv2d", ("_conv_forward",)),
    nn.Conv3d: ("conv3d", ("_conv_forward",)),
    nn.ConvTranspose1d: ("transposed_conv", ("_output_padding",)),
    nn.ConvTranspose2d: ("transposed_conv", ("_output_padding",)),
    nn.ConvTranspose3d: ("transposed_conv", ("_output_padding",)),
    nn.LayerNorm: ("norm", ()),
    nn.RMSNorm: ("norm", ()),
    nn.GroupNorm: ("norm", ()),
    nn.SyncBatchNorm: ("norm", ()),
    _BatchNorm: ("norm", ()),
    _InstanceNorm: ("norm", ("_apply_instance_norm", "_handle_no_batch_input")),
}
"""Torch's layers: ``{class: (kind, methods that its forward calls and a subclass may override)}``."""

ELSEWHERE = {("transformers.pytorch_utils", "Conv1D"): "transposed_linear"}
"""Layers of other packages, looked up only if the package has been imported, as it must be for a model to have one."""

WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks that compute the weight before the forward reads it, and do not change input or output."""

MOVING_HOOKS = (("accelerate.hooks", "AlignDevicesHook"),)
"""Patches of a layer's forward that only move tensors between devices."""

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EXACT = 2**22
"""Layers with up to this many numbers are examined in double precision."""

ASKED = 4
"""The number of inputs that a layer is tried with: two shapes at two scales."""


def _original(layer: type[nn.Module]) -> Forward | None:
    """The forward that torch defines; ``None`` if the class has been patched."""
    forward = layer.forward
    own = getattr(forward, "__module__", "").startswith("torch.nn.") and not hasattr(forward, "__wrapped__")
    return forward if own else None


FORWARDS: dict[Forward, type[nn.Module]] = {
    forward: layer for layer in LAYERS if (forward := _original(layer)) is not None
}
"""Torch's own forwards, by the function object."""


def family(module: nn.Module) -> str | None:
    """The kind of layer that ``module`` is or derives from, which says how its weight is laid out.

    >>> class Doubled(nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> family(Doubled(2, 2)), family(nn.Tanh())
    ('linear', None)
    """
    for layer, (kind, _) in LAYERS.items():
        if isinstance(module, layer):
            return kind
    return next((kind for layer, kind in _loaded(ELSEWHERE) if isinstance(module, layer)), None)


def forward_of(module: nn.Module) -> Forward:
    """The function that computes the module's output: its class's, unless the instance has its own.

    >>> layer = nn.Linear(2, 2)
    >>> forward_of(layer) is nn.Linear.forward
    True
    >>> layer.forward = lambda x: x
    >>> forward_of(layer) is nn.Linear.forward
    False
    """
    own = vars(module)
    if "forward" not in own:
        return type(module).forward
    forward = own["forward"]
    moving = tuple(hook for hook, _ in _loaded(dict.fromkeys(MOVING_HOOKS, "")))
    if moving and isinstance(own.get("_hf_hook"), moving):
        forward = own.get("_old_forward", forward)
    forward = getattr(forward, COMPILED, forward)
    # A bound method that was set on the instance is still the class's function.
    return forward.__func__ if isinstance(forward, types.MethodType) and forward.__self__ is module else forward


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` computes exactly torch's own function of its input and weight.

    >>> is_known(nn.Linear(2, 2)), is_known(nn.Sequential())
    (True, False)
    """
    if type(module).__call__ is not nn.Module.__call__ or hooked(module):
        return False
    forward = forward_of(module)
    layer = FORWARDS.get(forward) if isinstance(forward, types.FunctionType) else None
    if layer is None:
        return any(forward is elsewhere.forward for elsewhere, _ in _loaded(ELSEWHERE))
    helpers = LAYERS[layer][1]
    return all(getattr(type(module), name) is getattr(layer, name) and name not in vars(module) for name in helpers)


def hooked(module: nn.Module) -> bool:
    """Whether hooks may change the input or output of ``module``.

    >>> layer = nn.Linear(2, 2)
    >>> handle = layer.register_forward_hook(lambda module, args, output: 2 * output)
    >>> hooked(layer), hooked(nn.utils.prune.identity(nn.Linear(2, 2), "weight"))
    (True, False)
    """
    before = (hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, WEIGHT_HOOKS))
    return bool(module._forward_hooks) or next(before, None) is not None


def is_plain(tensor: Any) -> bool:
    """Whether ``tensor`` stores its own values, in a dtype to which a change can be added.

    >>> is_plain(nn.Parameter(torch.zeros(2))), is_plain(torch.zeros(2, dtype=torch.int8)), is_plain(None)
    (True, False, False)
    """
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.dtype in PLAIN


# -- evidence ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """What running a private copy shows about a layer.

    Attributes:
        kind: ``linear``, ``transposed_linear``, ``norm``, or ``None`` for other layers.
        exact: whether formulas on activations hold; if not, the weight still has the kind's layout.
        packed: whether the layer is affine but its weight does not store the matrix's entries.
        features: widths of input and output.
        channel_axis: axis of the output that has the features.
        why: why the layer has no kind.
    """

    kind: str | None = None
    exact: bool = True
    packed: bool = False
    features: tuple[int, int] = (0, 0)
    channel_axis: int = -1
    why: str = ""


def shown(module: nn.Module) -> Shown:
    """Examine a layer whose class is not one of torch's.

    >>> class Own(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(3, 2))
    ...     def forward(self, x):
    ...         return x @ self.weight.T
    >>> shown(Own()).kind, shown(Own()).features
    ('linear', (2, 3))
    """
    entering, leaving = getattr(module, "in_features", None), getattr(module, "out_features", None)
    features = (entering, leaving) if isinstance(entering, int) and isinstance(leaving, int) else None
    weight = module._parameters.get("weight")
    plain = is_plain(weight)
    if plain and weight is not None and weight.ndim == 1:
        return _norm(module, len(weight))
    if plain and weight is not None and weight.ndim == 2:
        return _linear(module, weight, features)
    return Shown() if features is None else _affine(module, features)


def _linear(module: nn.Module, weight: Tensor, features: tuple[int, int] | None) -> Shown:
    """Whether the module is ``F.linear`` of its weight, (out, in) or, transposed, (in, out), and its bias."""
    rows, columns = weight.shape
    layouts = (("linear", (columns, rows)), ("transposed_linear", (rows, columns)))
    asked = [(kind, sizes) for kind, sizes in layouts if features in (None, sizes)]
    if features is not None and not asked:
        told = f"in_features={features[0]} and out_features={features[1]}"
        return Shown(why=f"its weight has shape {tuple(weight.shape)}, which does not fit {told}")
    try:
        copied = _private(module)
    except Exception as error:  # copying runs the class's own code, which may raise anything
        return Shown(why=f"it cannot be copied ({_first_line(error)})")
    why = ""
    for kind, sizes in asked:
        evaluating, why_not = _is_linear(copied.eval(), kind, sizes[0])
        if evaluating:
            # If the forward differs in training, or runs in low precision or on meta, where a factor near 1 would go
            # unnoticed, only the layout of the weight is certain.
            precise = copied.weight.dtype == torch.float64 and not copied.weight.is_meta
            training, _ = _is_linear(copied.train(), kind, sizes[0])
            return Shown(kind, evaluating == training == ASKED and precise and not hooked(module), features=sizes)
        why = why or why_not
    return Shown(why=why)


def _is_linear(copied: Any, kind: str, width: int) -> tuple[int, str]:
    """``(number of inputs that yield F.linear, reason)``; the number is 0 if any yields something else."""
    matrix = copied.weight if kind == "linear" else copied.weight.mT
    close = 1e-5 if matrix.dtype == torch.float64 else 4 * torch.finfo(matrix.dtype).eps
    answered, why = 0, ""
    for x in _inputs(copied.weight, width):
        y, why_not = _answer(copied, x)
        if y is None:
            why = why or why_not
        elif _alike(y, F.linear(x, matrix, _own(copied, "bias")), close):
            answered += 1
        else:
            return 0, "its forward does not compute F.linear(x, weight, bias)"
    return answered, why


def _affine(module: nn.Module, features: tuple[int, int]) -> Shown:
    """Whether the module is affine with the widths that it states, as one with a packed or computed weight is."""
    try:
        copied = copy_structure(module).eval()
        _without_hooks(copied)
    except Exception as error:  # copying runs the class's own code, which may raise anything
        return Shown(why=f"it cannot be copied ({_first_line(error)})")
    own = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    dtypes = dict.fromkeys([*(t.dtype for t in own if t.dtype in PLAIN), torch.float32, torch.bfloat16, torch.float16])
    why = ""
    for dtype in dtypes:
        rng = torch.Generator().manual_seed(0)
        one, two = (torch.randn(4, features[0], generator=rng).mul(0.1).to(device, dtype) for _ in range(2))
        answers: list[Tensor] = []
        for x in (torch.zeros_like(one), one, two, one + two, 2 * one):
            y, why_not = _answer(copied, x)
            if y is None:
                why = why or why_not
                break
            answers.append(y)
        if len(answers) < 5:
            continue
        if any(tuple(y.shape) != (4, features[1]) for y in answers):
            return Shown(why=f"its output has shape {tuple(answers[0].shape)}, not (4, {features[1]})")
        zero, of_one, of_two, of_sum, of_double = (y.float() for y in answers)
        # Layers that quantise their input are affine only up to that error.
        sums = _alike(of_sum - zero, of_one + of_two - 2 * zero, 5e-2)
        if sums and _alike(of_double - zero, 2 * (of_one - zero), 5e-2):
            return Shown("linear", packed=True, features=features)
        return Shown(why="its forward is not affine")
    return Shown(why=why)


def _norm(module: nn.Module, width: int) -> Shown:
    """Whether the module divides by a norm over as many features as its weight has, and on which axis."""
    try:
        copied = _private(module)
    except Exception as error:  # copying runs the class's own code, which may raise anything
        return Shown(why=f"it cannot be copied ({_first_line(error)})")
    axis = channel_axis(copied, width)
    if axis is None:
        return Shown(why="its forward is not a norm")
    x = _activations(copied.weight, width, axis)
    exact = not hooked(module)
    for training in (False, True):
        copied.train(training)
        y, _ = _answer(copied, x)
        larger, _ = _answer(copied, 4 * x)
        if y is None or larger is None or not _alike(larger, y, 1e-4):
            return Shown(why="its forward is not a norm")
        bias = _own(copied, "bias")
        if bias is not None:
            exact &= copied.weight.dtype == torch.float64 and _adds_bias(copied, x, y, bias, axis)
    return Shown("norm", exact, features=(width, width), channel_axis=axis)


def _adds_bias(copied: nn.Module, x: Tensor, y: Tensor, bias: Tensor, axis: int) -> bool:
    """Whether an offset added to the bias is added to the output, feature by feature."""
    step = torch.arange(1, len(bias) + 1, device=bias.device, dtype=bias.dtype)
    copied._parameters["bias"] = nn.Parameter(bias + step, requires_grad=False)
    moved, _ = _answer(copied, x)
    copied._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    return moved is not None and _alike((moved - y).movedim(axis, -1), step.expand(y.movedim(axis, -1).shape), 1e-5)


def channel_axis(module: nn.Module, width: int) -> int | None:
    """The axis of a norm's output along which its weight, or else its bias, acts: -1, 1 or ``None``.

    >>> channel_axis(nn.LayerNorm(5), 5), channel_axis(nn.GroupNorm(1, 5), 5), channel_axis(nn.Tanh(), 5)
    (-1, 1, None)
    """
    copied = _private(module)
    for name in ("weight", "bias"):
        own = copied._parameters.get(name)
        if own is None or own.shape != (width,):
            continue
        for axis in (-1, 1):
            x = _activations(own, width, axis)
            y, _ = _answer(copied, x)
            if y is not None and y.shape == x.shape and (own.is_meta or _acts_at(copied, name, x, y, axis)):
                return axis
    return None


def _acts_at(copied: nn.Module, name: str, x: Tensor, y: Tensor, axis: int) -> bool:
    """Whether each entry of the tensor ``name`` changes only that feature of the output."""
    own = copied._parameters[name]
    assert own is not None
    for k in {0, len(own) - 1}:
        step = torch.zeros_like(own)
        step[k] = 1.0
        copied._parameters[name] = nn.Parameter(own + step, requires_grad=False)
        moved, _ = _answer(copied, x)
        copied._parameters[name] = own
        if moved is None:
            return False
        change = (moved - y).movedim(axis, -1)
        if not change[..., k].any() or change[..., step == 0].any():
            return False
    return True


def reads_bias(module: nn.Module, inputs: list[Tensor]) -> bool:
    """Whether a module without a bias would add one if it had one; ``inputs`` are tried in turn.

    >>> reads_bias(nn.Linear(2, 3, bias=False), [torch.zeros(1, 2)]), reads_bias(nn.RMSNorm(2), [torch.ones(1, 2)])
    (True, False)
    """
    weight = module._parameters.get("weight")
    if not is_plain(weight) or weight is None:
        return False
    copied = _private(module)
    width = len(weight)
    for x in inputs:
        given = x.to(copied.weight) if x.is_floating_point() else x.to(weight.device)
        bare = _run(copied, given)[0]
        if bare is None:
            continue
        # Registered as a parameter, so that only a forward that reads it under that name is affected.
        copied._parameters["bias"] = nn.Parameter(copied.weight.new_full((width,), 3.0), requires_grad=False)
        moved = _run(copied, given)[0]
        copied._parameters["bias"] = None
        if moved is None:
            continue
        pairs = list(zip(pytree.tree_leaves(bare), pytree.tree_leaves(moved), strict=True))
        if any(isinstance(a, Tensor) and a.is_meta for a, _ in pairs):
            continue  # no values to compare
        return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs)
    return False


# -- runs of a private copy ----------------------------------------------------------------------------------------


def _private(module: nn.Module) -> Any:
    """A copy with its own weight and bias, in double precision if that is cheap, and without hooks.

    Hooks could have effects elsewhere.
    """
    copied = copy_structure(module).eval()
    _without_hooks(copied)
    tensors = [*copied.parameters(), *copied.buffers()]
    if all(is_plain(t) or not t.is_floating_point() for t in tensors) and sum(t.numel() for t in tensors) <= EXACT:
        copied.double()
    # Initial zeros would hide what the forward does with them.
    rng = torch.Generator().manual_seed(1)
    for name in ("weight", "bias"):
        own = copied._parameters.get(name)
        if is_plain(own) and own is not None:
            drawn = torch.randn(own.shape, generator=rng) / math.sqrt(max(1, own.shape[-1]))
            copied._parameters[name] = nn.Parameter(drawn.to(own), requires_grad=False)
    return copied


def _without_hooks(module: nn.Module) -> None:
    for child in module.modules():
        child._forward_hooks.clear()
        for key in [key for key, hook in child._forward_pre_hooks.items() if not isinstance(hook, WEIGHT_HOOKS)]:
            del child._forward_pre_hooks[key]


def _inputs(like: Tensor, width: int) -> Iterator[Tensor]:
    """Rows, and rows of tokens, of normal scale and so large that any clipping shows."""
    rng = torch.Generator().manual_seed(0)
    large = 1e4 if like.dtype in (torch.float32, torch.float64) else 16.0
    for shape in ((2, width), (2, 3, width)):
        for scale in (1.0, large):
            yield (torch.randn(shape, generator=rng) * scale).to(like)


def _activations(like: Tensor, width: int, axis: int) -> Tensor:
    """Hidden values with ``width`` features on ``axis``, so large that a norm's epsilon does not matter."""
    rng = torch.Generator().manual_seed(0)
    shape = (2, 3, width) if axis == -1 else (2, width, 3, 5)
    return (torch.randn(shape, generator=rng) * 100).to(like)


def _own(module: nn.Module, name: str) -> Tensor | None:
    return module._parameters.get(name)


def _answer(module: nn.Module, x: Tensor) -> tuple[Tensor | None, str]:
    """``(output, "")`` if the module returns a tensor, else ``(None, reason)``."""
    y, why = _run(module, x)
    if y is None or isinstance(y, Tensor):
        return y, why
    return None, f"its forward returns {type(y).__name__}, not a tensor"


def _run(module: nn.Module, x: Tensor) -> tuple[Any, str]:
    """``(output, "")`` of the module for ``x``, or ``(None, reason)`` if there is none."""
    quiet = torch.autocast(x.device.type, enabled=False) if x.device.type != "meta" else contextlib.nullcontext()
    # Outside inference mode and transforms, which would affect the copy's tensors, and without drawing random numbers.
    with torch.inference_mode(False), torch.no_grad(), outside_transforms(), quiet, _Undrawn():
        try:
            y = module(x)
        except Exception as error:  # the module is foreign code, and any failure answers the question
            return None, f"its forward cannot be called with one tensor ({_first_line(error)})"
    return (y, "") if y is not None else (None, "its forward returns nothing")


class _Undrawn(ThreadMode):
    """A block in which operators that draw random numbers raise before they draw."""

    supports_higher_order_operators = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError("it draws random numbers")
        return func(*args, **(kwargs or {}))


def _alike(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    if found.shape != wanted.shape:
        return False
    if found.is_meta:
        return True
    gap = (found.to(wanted.dtype) - wanted).abs().max()
    return bool(gap <= tolerance * wanted.abs().max())


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:120]}" if text else type(error).__name__


def _loaded(table: dict[tuple[str, str], str]) -> list[tuple[Any, str]]:
    """The entries of ``table`` whose package has been imported, as ``(class, kind)``."""
    found = ((getattr(sys.modules.get(module), name, None), kind) for (module, name), kind in table.items())
    return [(cls, kind) for cls, kind in found if cls is not None]
