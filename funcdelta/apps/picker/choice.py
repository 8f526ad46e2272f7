"""What a choice of modules gives: sites, parameters, the names to paste, and where the method cannot act.

The numbers are those of the delta itself, built for every choice; nothing is estimated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ...errors import FuncdeltaError, MatchError
from ...methods.config import BaseDeltaConfig
from ...model import DeltaModel
from .naming import exact_names, short_names

LINE = 46
"""The width of the page's column: longer text gets one name a line."""


@dataclass(frozen=True)
class Choice:
    """The figures of one choice.

    Attributes:
        names: what ``modified_modules`` has to be.
        text: the same as a line of Python to paste.
        sites: how many modules the delta acts at.
        parameters: how many numbers of one member train.
        error: why the delta cannot be built; empty if it can.
        refused: ``{chosen path: why the method cannot act there}``.
    """

    names: tuple[str, ...]
    text: str
    sites: int = 0
    parameters: int = 0
    error: str = ""
    refused: tuple[tuple[str, str], ...] = ()


def assess(model: nn.Module, paths: Mapping[str, str], config: BaseDeltaConfig, chosen: Sequence[str]) -> Choice:
    """The figures of ``config`` at the modules ``chosen``, which are keys of ``paths`` (``naming.paths_of``).

    >>> from funcdelta.apps.picker.naming import paths_of
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> choice = assess(model, paths_of(model), fd.LoraConfig(lora_r=2), ["0", "2"])
    >>> choice.text, choice.sites, choice.parameters
    ('modified_modules=["0", "2"]', 2, 44)
    >>> assess(model, paths_of(model), fd.LoraConfig(lora_r=2), ["0", "1"]).error
    'lora cannot act at 1: it changes Linear, Conv1D, Embedding, Conv1d/2d/3d and ConvTranspose1d/2d/3d, not ReLU.'
    """
    names = at(config, short_names(paths, chosen)).modified_modules or ()
    text = pasted(names)
    if not names:
        return Choice(names, text)
    try:
        delta = DeltaModel(model, at(config, short_names(paths, chosen)))
    except FuncdeltaError as error:
        return Choice(names, text, error=str(error), refused=tuple(refused(model, paths, config, chosen)))
    trained = sum(math.prod(shape) for name, shape in delta.shapes.items() if delta.trainable(name))
    return Choice(names, text, len(delta.sites), trained)


def at(config: BaseDeltaConfig, names: Sequence[str] | None) -> BaseDeltaConfig:
    """``config`` at other modules, which are named as the model names them.

    A method that reads its names as pairs gets each name twice: it acts around every module, not from one to the next.

    >>> at(fd.LoraConfig(modified_modules=["attn@.q@"]), ["query"]).modified_modules
    ('query',)
    >>> at(fd.ParallelAdapterConfig(), ["query", "value"]).modified_modules
    ('query', 'query', 'value', 'value')
    """
    times = 2 if config.gives("spans") else 1
    given = None if names is None else tuple(name for name in names for _ in range(times))
    return config.replace(modified_modules=given, exclude_modules=None, common_structure=None)


def refused(
    model: nn.Module, paths: Mapping[str, str], config: BaseDeltaConfig, chosen: Sequence[str]
) -> list[tuple[str, str]]:
    """``(path, why not)`` for every chosen module where the method cannot act alone.

    One module is tried for all of its kind: those with the same class, shapes and path, numbers aside.

    >>> from funcdelta.apps.picker.naming import paths_of
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> [path for path, _ in refused(model, paths_of(model), fd.LoraConfig(), ["0", "1"])]
    ['1']
    """
    kinds: dict[object, list[str]] = {}
    for path in chosen:
        module = model.get_submodule(path)
        shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
        kinds.setdefault((type(module), shapes, re.sub(r"\d+", "#", path)), []).append(path)
    found: list[tuple[str, str]] = []
    for alike in kinds.values():
        try:
            DeltaModel(model, at(config, exact_names(paths, alike[:1])))
        except FuncdeltaError as error:
            found += [(path, str(error)) for path in alike]
    return found


def usual(model: nn.Module, config: BaseDeltaConfig) -> list[str]:
    """The modules that the method takes when none are given.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=10)
    >>> usual(BertModel(BertConfig(**sizes)), fd.LoraConfig())[:2]
    ['encoder.layer.0.attention.self.query', 'encoder.layer.0.attention.self.value']
    """
    delta = DeltaModel(model, at(config, None))
    span = next((a.site for a in delta.plan.all() if a.site.exit not in (None, a.site.path)), None)
    if span is not None:
        raise MatchError(
            f"The usual sites of {config.delta_type} begin at one module and end at another, as from {span.path} to "
            f"{span.exit}, and a page of single modules cannot show that: leave out modified_modules to have them."
        )
    return list(delta.sites)


def pasted(names: Sequence[str]) -> str:
    r"""``names`` as an argument in Python source.

    >>> print(pasted(["query", r"[r]layer\.[0-5]"]))
    modified_modules=["query", r"[r]layer\.[0-5]"]
    """
    quoted = [f'r"{name}"' if "\\" in name and '"' not in name else json.dumps(name) for name in names]
    line = f"modified_modules=[{', '.join(quoted)}]"
    if len(line) <= LINE or len(names) == 1:
        return line
    return "modified_modules=[\n" + "".join(f"    {name},\n" for name in quoted) + "]"
