"""What an architecture of the zoo is, what its flags say, and the makers of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VOCABULARY = 64
HIDDEN = 16
CLASSES = 3
LENGTH = 6  # divisible by 2 and 3: a fold that takes the sequence axis for the batch axis goes unnoticed otherwise
FIRST_TOKEN = 4  # below it stand the special tokens, which the inputs never use: a pad embedding has no gradient

# zoo_flags.py measures each of these, and test_zoo.py holds the tables to the measurement. Transforms are
# measured on the frozen model with a hook on every module, as a library that trains deltas only would run it.
FLAGS = {
    "mask": "takes an attention_mask of shape (rows, length)",
    "tied": "two parameter names hold one tensor",
    "shared": "a module with parameters is called several times in a forward",
    "dropout": "in training mode two calls differ",
    "batch_norm": "has BatchNorm: in training mode rows mix and buffers are written",
    "moe": "routes tokens to experts: outputs jump where the routing changes",
    "cache": "returns a cache unless called with use_cache=False; torch.vmap cannot return one",
    "batch_free_site": "a module with parameters gets a first argument without a batch axis (positions)",
    "batch_free_target": "so does one of ``linears``: a delta there differs by member without a batch axis",
    "token_site": "a module with parameters gets (rows * length, width): rows are not its leading axis",
    "fused_no_grad": "runs a fused kernel that calls no submodule, unless hooks or gradients are in the way",
    "no_float64": "raises in float64",
    "float32_inside": "computes a part in float32 whatever its dtype; DoublePrecision undoes it",
    "no_func": "every transform of torch.func raises (an autograd.Function in the old style)",
    "no_vmap": "torch.vmap over weights raises even where the mask is shared by the members",
    "no_vmap_grad": "torch.vmap of torch.func.grad over weights raises",
    "vmap_mask_raises": "a mapped attention_mask raises under torch.vmap (control flow that reads the mask)",
    "no_jvp": "torch.func.jvp with respect to a weight raises even with the math form of attention",
    "needs_math_attention": "double backward raises with fused attention and works with the math form",
    "no_second_order": "double backward raises even with the math form of attention",
    "no_fullgraph": "torch.compile(fullgraph=True) raises on the bare model",
}


@dataclass(frozen=True)
class Architecture:
    """One architecture of the zoo: how to build it, feed it, and where deltas act."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the same model at every call: eval mode, float32, and the caller's random state as it was."""
    inputs: Callable[..., dict[str, Any]]
    """``inputs(rows, seed=0, mask=True)``: keyword arguments, and positional ones under ``"args"``."""
    linears: tuple[str, ...]
    """Targets for LoRA: modules with a weight matrix (Linear, Conv1D, Conv1d, Conv2d, Embedding)."""
    blocks: tuple[str, ...]
    """Targets for adapters: modules that return a hidden tensor (..., hidden), or a tuple headed by one."""
    head: str
    """A module to train whole (``unfrozen_modules``)."""
    default_target: str
    """The one target to use where a test needs no more."""
    output: Callable[[Any], Tensor]
    """Picks the main tensor, rows first, out of what the model returns."""
    flags: frozenset[str] = frozenset()
    hidden: int = HIDDEN
    """Width of the output of ``blocks``."""
    attention: tuple[str, ...] = ()
    """Targets for prefixes: modules that call Transformers' attention interface or hold one that does."""

    def __post_init__(self) -> None:
        unknown = self.flags - FLAGS.keys()
        if unknown:
            raise ValueError(f"{self.name}: unknown flags {sorted(unknown)}")

    def call(self, model: Callable[..., Any], inputs: Mapping[str, Any], **extra: Any) -> Tensor:
        """``output(model(*args, **kwargs))``: the main output tensor for what ``inputs`` made."""
        keywords = {name: value for name, value in inputs.items() if name != "args"}
        return self.output(model(*inputs.get("args", ()), **keywords, **extra))

    def double(self) -> nn.Module:
        """The model in float64; see ``DoublePrecision``."""
        return self.build().to(torch.float64)


class DoublePrecision(TorchFunctionMode):
    """Inside it, what asks for float32 gets float64, so that a float64 model rounds nowhere to float32.

    RMSNorm, routers and BLOOM's softmax compute in float32 whatever the model's dtype; finite differences in
    float64 are then good to three digits only. Works under autograd and torch.func; not under torch.compile.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def convert(inputs: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same inputs with ``change`` applied to every tensor, those under ``"args"`` too."""
    return {
        name: tuple(change(item) for item in value) if name == "args" else change(value)
        for name, value in inputs.items()
    }


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same inputs with floating tensors in ``dtype`` (token ids and masks stay as they are)."""
    return convert(inputs, lambda value: value.to(dtype) if value.is_floating_point() else value)


def take_rows(inputs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """The same inputs for a slice of the rows."""
    return convert(inputs, lambda value: value[rows])


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draws every parameter and running statistic anew, in place, and sets eval mode; returns the model.

    Matrices are N(0, 0.2²), which lets every token matter to the output of a tiny model; vectors move by
    N(0, 0.1²) around 1 (norm weights) or 0 (biases), so that a lost one shows.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, deviation: float) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32) * deviation

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(noise(parameter, 0.2))
            else:
                parameter.copy_(noise(parameter, 0.1) + (0.0 if name.endswith("bias") else 1.0))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(noise(buffer, 0.1))
            elif name.endswith("running_var"):
                buffer.copy_(1.0 + noise(buffer, 0.1).abs())
    return model.eval()


def builder(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A ``build`` out of a constructor: weights drawn anew, the caller's random state left alone."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            model = make()
        return randomise(model, seed=7)

    return build


def _by_row(rows: int, seed: int, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
    """(rows, ...): row i depends on (seed, i) alone."""
    return torch.stack([draw(torch.Generator().manual_seed(1000 * seed + row)) for row in range(rows)])


def tokens(rows: int, seed: int = 0, length: int = LENGTH) -> Tensor:
    """Random ordinary token ids (rows, length)."""
    return _by_row(rows, seed, lambda g: torch.randint(FIRST_TOKEN, VOCABULARY, (length,), generator=g))


def padding(rows: int, length: int = LENGTH) -> Tensor:
    """An attention mask (rows, length), padded on the right: row 0 is whole, each next one shorter."""
    lengths = torch.tensor([length - row % (length - 1) for row in range(rows)])
    return (torch.arange(length) < lengths.unsqueeze(1)).long()


def text(rows: int, seed: int = 0, mask: bool = True) -> dict[str, Any]:
    """Inputs of a model that reads one text: input_ids and attention_mask, each (rows, LENGTH)."""
    inputs: dict[str, Any] = {"input_ids": tokens(rows, seed)}
    return {**inputs, "attention_mask": padding(rows)} if mask else inputs


def text_pair(rows: int, seed: int = 0, mask: bool = True) -> dict[str, Any]:
    """Inputs of an encoder-decoder: those of ``text``, and decoder_input_ids (rows, 4) without padding."""
    return {**text(rows, seed, mask), "decoder_input_ids": tokens(rows, seed + 77, length=4)}


def numbers(keyword: str | None, *shape: int) -> Callable[..., dict[str, Any]]:
    """Inputs of a model that reads one float tensor (rows, *shape), by keyword or (None) by position."""

    def inputs(rows: int, seed: int = 0, mask: bool = True) -> dict[str, Any]:
        del mask  # no such input here
        value = _by_row(rows, seed, lambda g: torch.randn(*shape, generator=g, dtype=torch.float32))
        return {"args": (value,)} if keyword is None else {keyword: value}

    return inputs
