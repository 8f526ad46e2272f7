"""Private random numbers: code runs with generators of its own, and torch's global ones are neither read nor advanced.

``fork_rng`` and ``set_rng_state`` change the global generator and restore it; another thread that draws meanwhile gets
the changed numbers, and later some of its own a second time. Here the global generator is left alone. Instead, a
dispatch mode below autograd and ``torch.func``, which sees every random operator, passes another generator to it.

Not covered: numpy's and Python's generators, ``torch.manual_seed`` itself, and kernels that draw without declaring it
(operators written by others in C++ or Triton; the functions given to ``torch.cond``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _pop_mode,  # pyright: ignore[reportPrivateUsage]
    _push_mode,  # pyright: ignore[reportPrivateUsage]
)

from .errors import ConfigError, ParamsError
from .transforms import eager

__all__ = ["Generators", "ThreadMode", "drawn", "private_random", "refuse_draws"]

aten = torch.ops.aten


class Generators:
    """One generator per device, all with the same seed, made when first needed.

    >>> rng = Generators(7)
    >>> torch.equal(torch.rand(3, generator=rng.on("cpu")), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    True
    """

    def __init__(self, seed: int = 0) -> None:
        try:
            self.seed = operator.index(seed)
            self._made = {torch.device("cpu"): Generator().manual_seed(self.seed)}
        except (TypeError, ValueError, RuntimeError):
            raise ParamsError(f"A seed must be a 64-bit integer; found {seed!r} ({type(seed).__name__}).") from None

    def on(self, device: torch.device | str) -> Generator:
        """The generator for ``device``, in its present state.

        >>> Generators(0).on("cpu").device
        device(type='cpu')
        """
        device = torch.device(device)
        if device.index is None and device.type != "cpu":
            device = torch.device(device.type, torch.get_device_module(device).current_device())
        elif device.type == "cpu":
            device = torch.device("cpu")
        if device not in self._made:
            self._made[device] = Generator(device).manual_seed(self.seed)
        return self._made[device]

    def copy(self) -> Generators:
        """An independent copy in the same state, so that code run again draws the same numbers.

        >>> rng = Generators(0)
        >>> again = rng.copy()
        >>> torch.equal(torch.rand(3, generator=rng.on("cpu")), torch.rand(3, generator=again.on("cpu")))
        True
        """
        other = Generators(self.seed)
        other._made = {device: generator.clone_state() for device, generator in self._made.items()}
        return other


class ThreadMode(TorchDispatchMode):
    """A dispatch mode that affects this thread alone.

    torch's own ``__enter__`` also sets flags of the process, and ``__exit__`` restores what it found. If a second
    thread enters before the first one leaves, it later restores the flags that the first had set; the process then
    counts as inside a mode forever, which changes what ``torch.compile`` does. The stack of modes itself is per thread.
    """

    # Otherwise higher-order operators (flex_attention, cond) would raise in the block.
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Skipping would wrap every operation, which costs as much as many operations do, and import torch._dynamo.
        return False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__torch_dispatch__" in vars(cls):
            eager(vars(cls)["__torch_dispatch__"])

    def __enter__(self) -> Self:
        _push_mode(self)
        return self

    def __exit__(self, *_: object) -> None:
        _pop_mode()

    def inside(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the kernel of ``func`` so that this mode sees the operators that it calls."""
        _push_mode(self)
        try:
            return _opened(func, args, kwargs)
        finally:
            _pop_mode()


# -- which operators draw, and how ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Drawing:
    """How one overload draws.

    Attributes:
        run: makes the call with given generators; takes this object, args, kwargs and the generators.
        func: the overload to call.
        places: ``{argument: (position, default)}``.
        within: whether only operators that it calls draw, which a mode sees.
    """

    run: Callable[[_Drawing, tuple[Any, ...], dict[str, Any], Generators], Any]
    func: Any
    places: Mapping[str, tuple[int, Any]]
    within: bool = False

    def given(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument ``name`` as passed, or its default; ``None`` if there is no such argument."""
        if name in kwargs:
            return kwargs[name]
        place, default = self.places.get(name, (len(args), None))
        return args[place] if place < len(args) else default

    def draws(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call reads the global generator."""
        if _device(args, kwargs).type == "meta":
            return False
        generator = self.given("generator", args, kwargs)
        if generator is not None:
            return _is_global(generator)
        if any(self.given(name, args, kwargs) is False for name in ("train", "training")):
            return False
        return all(self.given(name, args, kwargs) for name in ("dropout", "dropout_p") if name in self.places)


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """The device that a call draws on: the one it names, else that of its first tensor, else the CPU."""
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device)
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


def _is_global(generator: Any) -> bool:
    """Whether it is torch's own, passed explicitly (wrapped in another Python object each time)."""
    device = generator.device
    # The CPU has one, other kinds of devices one per device.
    own: Any = [torch.default_generator]
    if device.type != "cpu":
        own = getattr(torch.get_device_module(device), "default_generators", ())
    return any(generator._cdata == other._cdata for other in own)


def _with_generator(drawing: _Drawing, args: tuple[Any, ...], kwargs: dict[str, Any], generators: Generators) -> Any:
    """Call the operator, or its overload that takes a generator, with ours."""
    given = drawing.given("generator", args, kwargs)
    if given is not None and not _is_global(given):
        return drawing.func(*args, **kwargs)
    generator = generators.on(_device(args, kwargs))
    place = drawing.places["generator"][0]
    if place < len(args):
        return drawing.func(*args[:place], generator, *args[place + 1 :], **kwargs)
    return drawing.func(*args, **{**kwargs, "generator": generator})


def _dropout(drawing: _Drawing, args: tuple[Any, ...], kwargs: dict[str, Any], generators: Generators) -> Any:
    """``native_dropout``, which takes no generator, computed as its CPU kernel does."""
    x, p, train = (drawing.given(name, args, kwargs) for name in ("input", "p", "train"))
    if train is False:
        out, mask = x.clone(), torch.ones_like(x, dtype=torch.bool)
    else:
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p, generator=generators.on(x.device))
        out = x.mul(mask).mul_(0.0 if p == 1 else 1 / (1 - p))
    if "out0" not in kwargs:
        return out, mask
    for room, value in ((kwargs["out0"], out), (kwargs["out1"], mask)):
        room.resize_(value.shape).copy_(value)
    return kwargs["out0"], kwargs["out1"]


def _attention(drawing: _Drawing, args: tuple[Any, ...], kwargs: dict[str, Any], generators: Generators) -> Any:
    """Fused attention with dropout, computed by matrix products because its kernels draw the mask themselves.

    Their backward passes would draw the mask again from a state that does not exist. So this raises if a graph is
    built; a graph that a transform builds unseen gets NaN rather than gradients of another mask.
    """
    q, k, v = (drawing.given(name, args, kwargs) for name in ("query", "key", "value"))
    bias, p = drawing.given("attn_bias", args, kwargs), drawing.given("dropout_p", args, kwargs)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v, bias)):
        return _hidden(drawing, args, kwargs, generators)
    scores = *q.shape[:-1], k.shape[-2]
    keep = torch.empty(scores, dtype=torch.bool, device=q.device).bernoulli_(1 - p, generator=generators.on(q.device))
    causal, scale = drawing.given("is_causal", args, kwargs), drawing.given("scale", args, kwargs)
    # Grouped heads: fewer for keys than for queries, on the third axis from the end.
    grouped = q.shape[-3] != k.shape[-3]
    out, _ = aten._scaled_dot_product_attention_math(q, k, v, bias, p, causal, keep, scale=scale, enable_gqa=grouped)
    rest = [
        (q.new_full(q.shape[:-1], torch.nan, dtype=torch.float32) if "sum" in value.name else q.new_empty(0))
        if "Tensor" in str(value.type)
        else 0
        for value in drawing.func._schema.returns[1:]
    ]
    return out, *rest


def _hidden(drawing: _Drawing, args: tuple[Any, ...], kwargs: dict[str, Any], generators: Generators) -> Any:
    """Raise: the kernel draws by itself and takes no generator."""
    raise ConfigError(
        f"{drawing.func} draws from torch's global generator inside its kernel and takes no other, so it cannot run "
        f"here. Turn its dropout off (model.eval(), or dropout=0), or use a version made of plain operators (for "
        f"attention, attn_implementation='eager')."
    )


def _within(drawing: _Drawing, args: tuple[Any, ...], kwargs: dict[str, Any], generators: Generators) -> Any:
    """Call a composition of operators, or a kernel written in Python, whose parts draw."""
    with PrivateRandom(generators):
        return _opened(drawing.func, args, kwargs)


def _opened(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the kernel of ``func`` itself, so that the active modes see the operators that it calls."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors):
        return func(*args, **kwargs)  # a tensor subclass decides what runs, and modes see that
    if tensors:
        keys = torch._C._dispatch_keys(tensors[0])
        for tensor in tensors[1:]:
            keys = keys | torch._C._dispatch_keys(tensor)
        keys = keys & torch._C._after_ADInplaceOrView_keyset
    else:
        key: Any = torch._C._parse_dispatch_key(_device(args, kwargs).type.upper())
        keys = torch._C.DispatchKeySet(key)
    return func.redispatch(keys, *args, **kwargs)


ATTENTION = {
    f"aten::_scaled_dot_product_{kind}"
    for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")
}
"""Kernels that draw a dropout mask themselves."""

DRAWN_BEFORE = {
    "aten::_cudnn_attention_backward",
    "aten::_fill_mem_eff_dropout_mask_",
    "aten::_flash_attention_forward_no_dropout_inplace",
    "aten::_fused_sdp_choice",
    "aten::_nested_tensor_softmax_with_shape",
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "rngprims::philox_rand",
}
"""Operators that torch marks as random although they read no generator: they get the seed, or only query it."""

_known: dict[int, tuple[Any, _Drawing | None]] = {}


def _drawing(func: Any) -> _Drawing | None:
    """How ``func`` draws; ``None`` if it does not."""
    known = _known.get(id(func))
    if known is None:
        # Keyed by id, because operators hash in Python, slowly; keeping the operator here keeps its id unique.
        known = _known[id(func)] = func, _find(func) if isinstance(func, torch._ops.OpOverload) else None
    return known[1]


def may_draw(func: Any) -> bool:
    """Whether an operator draws random numbers, or calls others that may.

    >>> may_draw(torch.ops.aten.add.Tensor), may_draw(torch.ops.aten.bernoulli.default)
    (False, True)
    """
    return _drawing(func) is not None


def _find(func: Any) -> _Drawing | None:
    name = func._schema.name
    places = _places(func)
    marked = torch.Tag.nondeterministic_seeded in func.tags
    if name in DRAWN_BEFORE:
        return None
    if name == "aten::native_dropout":
        return _Drawing(_dropout, func, places)
    if "generator" in places:
        return _Drawing(_with_generator, func, places)
    if marked and (other := _taking_a_generator(func)) is not None:
        return _Drawing(_with_generator, other, _places(other))
    # In inference mode a dispatch mode sees compositions whole, otherwise only their parts.
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    if _has_python_kernels(func) or (marked and composed):
        return _Drawing(_within, func, places, within=True)
    if name in ATTENTION and func._overloadname == "default":
        return _Drawing(_attention, func, places)
    if marked or ("backward" not in name and ("dropout" in name or places.keys() & {"dropout", "dropout_p"})):
        return _Drawing(_hidden, func, places)
    return None


def _places(func: Any) -> dict[str, tuple[int, Any]]:
    return {
        argument.name: (len(func._schema.arguments) if argument.kwarg_only else place, argument.default_value)
        for place, argument in enumerate(func._schema.arguments)
    }


def _taking_a_generator(func: Any) -> Any:
    """The overload of the same operator with the same arguments plus a generator; ``None`` if there is none."""

    def signature(schema: Any) -> list[tuple[str, str]]:
        return [(a.name, str(a.type)) for a in schema.arguments if a.name != "generator"]

    packet = func._overloadpacket
    for overload in (getattr(packet, name) for name in packet.overloads()):
        if "generator" in _places(overload) and signature(overload._schema) == signature(func._schema):
            return overload
    return None


def _has_python_kernels(func: Any) -> bool:
    """Whether it is a custom operator written in Python (``torch.library``), whose body may draw."""
    if func.namespace in ("aten", "prims", "rngprims"):
        return False
    own = func.name().replace("::", "/")
    kernels = (kernel.rpartition("/") for kernel in getattr(torch.library, "_impls", ()))
    return any(name == own and key != "Meta" and not key.startswith("Autograd") for name, _, key in kernels)


# -- what is public ---------------------------------------------------------------------------------------------------


def drawn(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, generators: Generators) -> Any:
    """``func(*args, **kwargs)`` with numbers from ``generators`` if it draws from torch's; else ``NotImplemented``.

    For dispatch modes with other duties besides. If ``func`` is a composition or written in Python (in inference mode
    ``dropout`` or ``lstm``; operators of ``torch.library``), it runs here, and that mode does not see its parts.

    >>> rng = Generators(7)
    >>> drawn(torch.ops.aten.rand.default, ([2],), {}, rng).tolist() == [
    ...     number.item() for number in torch.rand(2, generator=torch.Generator().manual_seed(7))
    ... ]
    True
    >>> drawn(torch.ops.aten.add.Tensor, (torch.ones(1), torch.ones(1)), {}, rng)
    NotImplemented
    """
    drawing = _drawing(func)
    if drawing is None:
        return NotImplemented
    kwargs = kwargs or {}
    if not (drawing.within or drawing.draws(args, kwargs)):
        return NotImplemented
    return drawing.run(drawing, args, kwargs, generators)


class _Watching(ThreadMode):
    """A mode that hands every call that would read torch's global generator to :meth:`draw`."""

    def draw(self, drawing: _Drawing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of such a call."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = _known.get(id(func))
        drawing, kwargs = known[1] if known is not None else _drawing(func), kwargs or {}
        if drawing is None:
            return func(*args, **kwargs)
        if drawing.within:
            return self.inside(func, args, kwargs)
        return self.draw(drawing, args, kwargs) if drawing.draws(args, kwargs) else func(*args, **kwargs)


class PrivateRandom(_Watching):
    """The block of :func:`private_random`."""

    def __init__(self, generators: Generators) -> None:
        super().__init__()
        self.generators = generators
        # The backward pass that each block began in; -1 outside of any.
        self._graphs: list[int] = []

    def __enter__(self) -> Self:
        self._graphs.append(torch._C._current_graph_task_id())
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._graphs.pop()

    def draw(self, drawing: _Drawing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._current_graph_task_id() != self._graphs[-1]:
            raise ConfigError(
                f"{drawing.func} drew in a backward pass, where gradient checkpointing runs modules again. A private "
                f"generator would give other numbers there than in the forward pass: turn checkpointing or dropout off."
            )
        return drawing.run(drawing, args, kwargs, self.generators)


def private_random(seed: int = 0) -> PrivateRandom:
    """A block whose random numbers come from private generators: those that ``torch.manual_seed(seed)`` would give.

    It affects this thread alone. The numbers depend on the seed alone; a ``generator=`` passed to a call is respected.
    torch's global generators are neither read nor advanced, even if other threads draw from them meanwhile. Fused
    attention with dropout is computed by matrix products; if it needs gradients it raises ``ConfigError``, as does any
    other kernel that draws unseen. So does a draw in a backward pass begun inside the block, where gradient
    checkpointing runs a module again and would draw other masks than the forward pass.

    >>> before = torch.get_rng_state()
    >>> with private_random(7):
    ...     numbers = nn.Dropout(0.5)(torch.ones(4)), torch.rand(2)
    >>> torch.equal(before, torch.get_rng_state())
    True
    >>> with private_random(7):
    ...     again = nn.Dropout(0.5)(torch.ones(4)), torch.rand(2)
    >>> all(map(torch.equal, numbers, again))
    True
    """
    return PrivateRandom(Generators(seed))


class RefusedDraws(_Watching):
    """The block of :func:`refuse_draws`."""

    def __init__(self, what: str, instead: str) -> None:
        super().__init__()
        self.what, self.instead = what, instead

    def draw(self, drawing: _Drawing, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise ConfigError(
            f"{self.what} drew from torch's global generator ({drawing.func}), so its numbers cannot be reproduced: "
            f"{self.instead}."
        )


def refuse_draws(what: str, instead: str = "pass generator=rng to every random call") -> RefusedDraws:
    """A block in which a draw from torch's global generator raises ``ConfigError``, in this thread.

    Args:
        what: the function that draws, for the message.
        instead: what to write, for the message.

    >>> rng = torch.Generator().manual_seed(0)
    >>> with refuse_draws("MyConfig.init"):
    ...     torch.rand(2, generator=rng).shape
    torch.Size([2])
    >>> with refuse_draws("MyConfig.init"):
    ...     nn.Linear(2, 2)
    Traceback (most recent call last):
    ...
    funcdelta.errors.ConfigError: MyConfig.init drew from torch's global generator (aten.uniform_.default), ...
    """
    return RefusedDraws(what, instead)
