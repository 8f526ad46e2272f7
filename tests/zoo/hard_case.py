"""What a hard model is: how to build and feed it, and the same model with a member's weights written in by hand."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo_architecture import randomise

import funcdelta as fd

VOCABULARY = 40
HIDDEN = 16
CLASSES = 3
FIRST_TOKEN = 3  # below it stand the special tokens

FLAGS = {
    "mixes": "rows of a batch depend on each other by design, so a row has no output of its own",
    "training": "runs in training mode",
    "draws": "draws from torch's generator in its forward",
    "random": "and a call gives one of several outputs",
    "float32": "computes a part in float32 whatever its dtype",
    "may_refuse": "its sites cannot be told from their class, so a build or a first call may refuse them by name",
    "keeps": "its modules keep something from call to call, so a written copy is called once",
    "no_func": "casts a layer of its own in every call (module.to), on which torch.func.grad crashes the process",
    "folds": 'engine="fold" has to give the number: no row meets another and every site sees rows',
    "routes": "apply_rows and bind_rows have to give the number",
    "generates": "has generate, and its decoding is compared too",
}

Batch = dict[str, Any]


def itself(output: Any) -> Tensor:
    """The output, a tensor already."""
    return output


def take_row(batch: Batch, row: int) -> Batch:
    """The same inputs with one row: every tensor is cut along its first axis, the rest stays."""
    return {
        name: value[row : row + 1] if isinstance(value, Tensor) and value.ndim else value
        for name, value in batch.items()
    }


@dataclass(frozen=True, eq=False)
class Hard:
    """One tiny model that broke a library of deltas, and what is known about it."""

    name: str
    make: Callable[[], nn.Module]
    """The constructor; ``build`` draws the weights anew."""
    inputs: Callable[[int, int, int], Batch]
    """``inputs(rows, seed, variant)``: keyword arguments. The seed moves values; a variant moves lengths, masks,
    routes or options, and within one all shapes are those of its first seed."""
    targets: tuple[str, ...]
    """Where LoRA acts."""
    trained: tuple[str, ...] = ()
    """Modules or parameters that are trained whole (``unfrozen_modules``)."""
    output: Callable[[Any], Tensor] = itself
    """Picks the main tensor, rows first."""
    flags: frozenset[str] = frozenset()
    variants: int = 1
    weights: float = 0.4
    """The standard deviation of matrices, large enough that every layer matters."""
    delta: float = 0.4
    """The standard deviation of a member's leaves."""
    batch_dim: int = 0
    without_rows: tuple[str, ...] = ()
    """Inputs that do not have a leading axis of rows: ``in_dims`` says ``None`` for them in one batch for all."""
    same_for_all: tuple[str, ...] = ()
    """Of these, what all members share where each has a batch of its own."""
    row: Callable[[Batch, int], Batch] | None = take_row
    """The inputs of one row alone; ``None`` where a row cannot stand alone."""
    turned: type[nn.Module] | None = None
    """A class of its own whose weight is (in, out)."""
    copies: bool = True
    """Whether a deep copy is the same model; not so where a closure holds on to a module."""

    def __post_init__(self) -> None:
        if unknown := self.flags - FLAGS.keys():
            raise ValueError(f"{self.name}: unknown flags {sorted(unknown)}")

    def build(self) -> nn.Module:
        """The model in float64 with weights of a fixed seed; the caller's random state stays as it was."""
        return copy.deepcopy(_original(self)) if self.copies else self._new()

    def _new(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = self.make()
        randomise(model, seed=7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(self.weights / 0.2)
        return model.double().train("training" in self.flags)

    def lora(self, model: nn.Module) -> fd.DeltaModel:
        """A LoRA of rank 2 and scale 2 on the targets, with the trained leaves."""
        return fd.LoraModel(
            model,
            lora_r=2,
            lora_alpha=4,
            modified_modules=list(self.targets),
            unfrozen_modules=["deltas", *self.trained],
            batch_dim=self.batch_dim,
        )

    def members(self, delta: fd.DeltaModel, n: int, seed: int = 0) -> dict[str, Tensor]:
        """A stack of n members away from their start; member i is the same whatever n is."""
        fresh = delta.init(seed, n=n)
        noise = [torch.Generator().manual_seed(100 * seed + i) for i in range(n)]

        def moved(name: str, leaf: Tensor) -> Tensor:
            draws = [torch.randn(leaf.shape[1:], generator=rng, dtype=torch.float64) for rng in noise]
            # A trained leaf of the backbone stays near its own value, so that norms keep their size.
            near = leaf if self._is_backbones(delta, name) else torch.zeros_like(leaf)
            return leaf if name in delta.constants else near + self.delta * torch.stack(draws).to(leaf)

        return {name: moved(name, leaf) for name, leaf in fresh.items()}

    @staticmethod
    def _is_backbones(delta: fd.DeltaModel, name: str) -> bool:
        return not any(name.startswith(f"{path}.lora.") for path in delta.sites)

    def one_batch_dims(self, batch: Batch) -> dict[str, None] | None:
        """``in_dims`` of a call in which all members see ``batch``."""
        return {name: None for name in self.without_rows if name in batch} or None

    def own_batches(self, batches: list[Batch]) -> tuple[Batch, Any]:
        """The inputs and ``in_dims`` of a call in which every member has a batch of its own."""
        joined = {
            name: torch.stack([batch[name] for batch in batches])
            if isinstance(value, Tensor) and name not in self.same_for_all
            else value
            for name, value in batches[0].items()
        }
        apart = any(name in joined for name in self.same_for_all)
        dims = {name: None if name in self.same_for_all else 0 for name, v in joined.items() if isinstance(v, Tensor)}
        return joined, dims if apart else 0

    @property
    def tolerance(self) -> float:
        return 2e-5 if "float32" in self.flags else 1e-9


@functools.lru_cache(maxsize=256)
def _original(hard: Hard) -> nn.Module:
    """The model that all others are deep copies of; nothing ever calls it, so it has cached nothing."""
    return hard._new()


def low_rank(params: Mapping[str, Tensor], path: str) -> Tensor:
    """``s B A`` of the site at ``path``, (out, in)."""
    piece = f"{path}.lora."
    return params[piece + "scale"] * params[piece + "lora_B"] @ params[piece + "lora_A"].flatten(1)


def weights_of(hard: Hard, model: nn.Module, sites: tuple[str, ...], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the member's weights are: ``W + s B A`` in the layer's own layout, and trained leaves as they are."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found = {name: leaf for name, leaf in params.items() if name in named}
    for path in sites if params else ():
        layer, change = model.get_submodule(path), low_rank(params, path)
        if isinstance(layer, (nn.Embedding, Conv1D, *([hard.turned] if hard.turned else []))):
            change = change.mT
        weight = named[f"{path}.weight"].detach()
        found[f"{path}.weight"] = weight + change.reshape(weight.shape)
    return found


def written(hard: Hard, sites: tuple[str, ...], params: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the backbone that nothing has called yet, with the member's weights in place of its own."""
    model = hard.build()
    for name, weight in weights_of(hard, model, sites, params).items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, nn.Parameter(weight.detach().clone(), requires_grad=False))
    return model


def written_call(hard: Hard, sites: tuple[str, ...], params: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The output of such a copy, differentiable with respect to ``params`` by plain autograd through ``W + s B A``."""
    model = hard.build()
    weights = weights_of(hard, model, sites, params)
    return hard.output(torch.func.functional_call(model, weights, (), dict(batch), tie_weights=False))


def tokens(rows: int, seed: int, length: int, until: int = VOCABULARY) -> Tensor:
    """Ordinary token ids (rows, length)."""
    return torch.randint(FIRST_TOKEN, until, (rows, length), generator=torch.Generator().manual_seed(seed))


def floats(rows: int, seed: int, *shape: int) -> Tensor:
    """Normal numbers (rows, *shape) in float64."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def right_padding(rows: int, length: int, shift: int = 0) -> Tensor:
    """A mask (rows, length): the rows have different lengths, of at least two, the first one whole."""
    lengths = torch.tensor([length - (row + (shift if row else 0)) % (length - 1) for row in range(rows)])
    return (torch.arange(length) < lengths[:, None]).long()
