"""Measures what the flags of the zoo say; ``python tests/zoo/zoo_flags.py`` prints the table.

A flag that says that something raises is measured by trying it: a new version of torch or Transformers that
mends (or breaks) it fails test_zoo.py until the table is brought up to date.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO, Architecture, DoublePrecision, cast

MEMBERS = 2
ROWS = 3
DIFFERENCE = 1e-5  # step of central differences: short enough to cross few kinks of a ReLU


def matched(model: nn.Module, target: str) -> list[str]:
    """Paths of the modules that ``target`` names by their last dotted names."""
    return [path for path, _ in model.named_modules() if path == target or path.endswith("." + target)]


def _raises(work: Callable[[], Any]) -> bool:
    """Whether ``work()`` raises one of torch's errors, all of which are RuntimeErrors."""
    try:
        work()
    except RuntimeError:
        return True
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch says when vmap falls back to a loop, and when jvp compiles its rules."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
        yield


class _OperatorNames(TorchDispatchMode):
    """Collects the names of the operators that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _Single:
    """One architecture's output and loss as functions of one weight, the rest of the model frozen."""

    def __init__(self, architecture: Architecture, model: nn.Module, dtype: torch.dtype) -> None:
        self.architecture = architecture
        self.model = model.to(dtype).requires_grad_(False)
        # A hook on every module keeps fused kernels away that would call no submodule.
        for module in model.modules():
            module.register_forward_hook(lambda module, args, output: None)
        self.name = matched(model, architecture.default_target)[0] + ".weight"
        self.weight = model.get_parameter(self.name).detach()
        self.inputs = cast(architecture.inputs(ROWS), dtype)
        self.extra = {"use_cache": False} if "cache" in architecture.flags else {}

    def output(self, weight: Tensor, **inputs: Any) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, {self.name: weight}, args, kwargs)

        return self.architecture.call(call, {**self.inputs, **inputs}, **self.extra)

    def loss(self, weight: Tensor) -> Tensor:
        return self.output(weight).square().mean()


def _input_shapes(architecture: Architecture, model: nn.Module, rows: int) -> list[tuple[str, tuple[int, ...]]]:
    """(path, shape of the first tensor argument) for each call of a module with parameters of its own."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    def record(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            seen.append((path, tuple(tensors[0].shape)))

        return hook

    handles = [
        module.register_forward_pre_hook(record(path), with_kwargs=True)
        for path, module in model.named_modules()
        if list(module.parameters(recurse=False))
    ]
    architecture.call(model, architecture.inputs(rows))
    for handle in handles:
        handle.remove()
    return seen


def structure_flags(architecture: Architecture) -> set[str]:
    """The flags that the structure and ordinary calls of the model show."""
    model = architecture.build()
    inputs = architecture.inputs(ROWS)
    seen = _input_shapes(architecture, model, ROWS)
    grown = _input_shapes(architecture, model, ROWS + 1)
    free = {path for (path, small), (_, large) in zip(seen, grown, strict=True) if small == large}
    leading = {large[0] - small[0] for (_, small), (_, large) in zip(seen, grown, strict=True)}
    targets = {path for target in architecture.linears for path in matched(model, target)}
    with torch.no_grad(), _OperatorNames() as operators:
        architecture.call(model, inputs)
    keywords = {name: value for name, value in inputs.items() if name != "args"}
    cache = getattr(model(*inputs.get("args", ()), **keywords), "past_key_values", None)
    model.train()  # last: BatchNorm writes its buffers now
    noisy = not torch.equal(architecture.call(model, inputs), architecture.call(model, inputs))
    found = {
        "mask": "attention_mask" in inputs,
        "tied": len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters())),
        "shared": max(Counter(path for path, _ in seen).values()) > 1,
        "batch_norm": any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()),
        "moe": any("Experts" in type(module).__name__ for module in model.modules()),
        "cache": cache is not None,
        "batch_free_site": bool(free),
        "batch_free_target": bool(free & targets),
        "token_site": max(leading) > 1,
        "fused_no_grad": "_transformer_encoder_layer_fwd" in operators.names,
        "dropout": noisy,
    }
    return {flag for flag, holds in found.items() if holds}


def transform_flags(architecture: Architecture) -> set[str]:
    """The flags that say which transforms of torch.func the model refuses, or gives wrong numbers for."""
    single = _Single(architecture, architecture.build(), torch.float32)
    weight = single.weight
    noise = torch.randn((MEMBERS, *weight.shape), generator=torch.Generator().manual_seed(5))
    stack = weight + 0.1 * noise
    expected = torch.stack([single.output(member) for member in stack])

    def same(found: Tensor) -> None:
        if not torch.allclose(found, expected, atol=1e-4):
            raise RuntimeError("vmap gives other numbers than a loop")

    def with_mask(member: Tensor, mask: Tensor) -> Tensor:
        return single.output(member, attention_mask=mask)

    flags = set()
    with _quiet():
        if _raises(lambda: grad(single.loss)(weight)):
            flags.add("no_func")
        if _raises(lambda: same(torch.vmap(single.output)(stack))):
            flags.add("no_vmap")
        if _raises(lambda: torch.vmap(grad(single.loss))(stack)):
            flags.add("no_vmap_grad")
        if "attention_mask" in single.inputs:
            masks = single.inputs["attention_mask"].expand(MEMBERS, -1, -1)
            if _raises(lambda: same(torch.vmap(with_mask)(stack, masks))):
                flags.add("vmap_mask_raises")
        with sdpa_kernel(SDPBackend.MATH):
            if _raises(lambda: jvp(single.loss, (weight,), (torch.ones_like(weight),))):
                flags.add("no_jvp")
    return flags


def precision_flags(architecture: Architecture) -> set[str]:
    """The flags of float64: first and second derivatives along a direction against central differences."""
    single = _Single(architecture, architecture.build(), torch.float64)
    weight = single.weight
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(5))
    if _raises(lambda: single.loss(weight)):
        return {"no_float64"}

    def slope(position: Tensor, create_graph: bool = False) -> Tensor:
        leaf = position if create_graph else position.clone().requires_grad_()
        return (torch.autograd.grad(single.loss(leaf), leaf, create_graph=create_graph)[0] * direction).sum()

    def curvature() -> Tensor:
        leaf = weight.clone().requires_grad_()
        return (torch.autograd.grad(slope(leaf, create_graph=True), leaf)[0] * direction).sum()

    def agrees(derivative: Tensor, function: Callable[[Tensor], Tensor]) -> bool:
        ahead, behind = function(weight + DIFFERENCE * direction), function(weight - DIFFERENCE * direction)
        return torch.allclose(derivative, (ahead - behind) / (2 * DIFFERENCE), rtol=1e-5)

    flags = set()
    if not agrees(slope(weight), single.loss):
        flags.add("float32_inside")
    fused_raises = _raises(curvature)
    with DoublePrecision(), sdpa_kernel(SDPBackend.MATH):
        if not agrees(slope(weight), single.loss):
            raise AssertionError(f"{architecture.name}: the gradient is not the difference quotient")
        if _raises(curvature) or not agrees(curvature(), slope):
            flags.add("no_second_order")
        elif fused_raises:
            flags.add("needs_math_attention")
    return flags


def measure(architecture: Architecture) -> set[str]:
    """Every flag of the architecture but ``no_fullgraph``, which takes seconds, measured now."""
    return structure_flags(architecture) | transform_flags(architecture) | precision_flags(architecture)


def measure_compile(architecture: Architecture) -> set[str]:
    """``{"no_fullgraph"}`` where the bare model does not compile as one graph (eager backend)."""
    model = architecture.build()
    inputs = architecture.inputs(ROWS)
    extra = {"use_cache": False} if "cache" in architecture.flags else {}
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with _quiet():
        raised = _raises(lambda: architecture.call(compiled, inputs, **extra))
    return {"no_fullgraph"} if raised else set()


def _milliseconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Best of ``repeats`` wall-clock times of ``work()``, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def row(architecture: Architecture) -> str:
    """One line of the table: size, milliseconds to build and to run, flags, what the table has amiss."""
    model, inputs = architecture.build(), architecture.inputs(ROWS)
    size = sum(parameter.numel() for parameter in model.parameters())
    build = _milliseconds(architecture.build)
    forward = _milliseconds(lambda: architecture.call(model, inputs))
    flags = measure(architecture) | measure_compile(architecture)
    line = f"{architecture.name:18} {size:6} {build:6.1f} {forward:6.2f}  {' '.join(sorted(flags))}"
    if flags == architecture.flags:
        return line
    return f"{line}\n{'':18} the table lacks {flags - architecture.flags} and has {architecture.flags - flags}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'name':18} {'params':>6} {'build':>6} {'run':>6}  flags (times in ms)")
    for each in ZOO.values():
        print(row(each), flush=True)
