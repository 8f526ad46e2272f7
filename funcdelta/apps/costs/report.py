"""The command ``funcdelta plan``: its options, and its answer as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...errors import ConfigError

if TYPE_CHECKING:
    from .measured import Cost

KINDS = ("backbone", "members", "gradients", "optimiser", "activations", "total")


def whole(text: str) -> int:
    """A whole number of at least 1.

    >>> whole("1000")
    1000
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"write a whole number of at least 1, not {text!r}")
    return int(text)


def add_options(plan: argparse.ArgumentParser) -> None:
    """Add the options of ``funcdelta plan`` to its parser.

    >>> parser = argparse.ArgumentParser()
    >>> add_options(parser)
    >>> parser.parse_args(["--backbone", "folder"]).members
    1
    """
    what = plan.add_argument_group("the backbone and its members")
    what.add_argument("--backbone", metavar="FOLDER", required=True, help="folder with a model's config.json")
    what.add_argument("--dtype", metavar="NAME", help="the dtype of its weights: bfloat16 (what its config says)")
    what.add_argument("--members", metavar="N", type=whole, default=1, help="how many deltas (1)")
    what.add_argument("--delta", metavar="TYPE", default="lora", help="the method (lora)")
    what.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="a field of its config; may be repeated"
    )
    how = plan.add_argument_group("a step of training")
    how.add_argument("--rows", metavar="B", type=whole, default=1, help="rows of each member (1)")
    how.add_argument("--length", metavar="S", type=whole, default=512, help="tokens of a row (512)")
    how.add_argument("--chunk", metavar="N", type=whole, help="members at a time (chunk_size)")
    plan.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> str:
    """The answer to ``options``; raises ``FuncdeltaError`` where they do not fit together.

    >>> from transformers import LlamaConfig
    >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    >>> LlamaConfig(vocab_size=32, **sizes).save_pretrained("tiny-llama")
    >>> parser = argparse.ArgumentParser()
    >>> add_options(parser)
    >>> json.loads(run(parser.parse_args(["--backbone", "tiny-llama", "--json"])))["cost"]["parameters"]
    4944
    """
    from ...methods.config import AutoDeltaConfig
    from ...model import DeltaModel
    from ..train.options import parse_fields
    from .measured import measure

    kind = AutoDeltaConfig.for_type(options.delta)
    delta = DeltaModel(backbone_of(options.backbone, options.dtype), kind(**parse_fields(kind, options.set)))
    cost = measure(delta, options.members, options.rows, options.length, options.chunk)
    if options.json:
        job = {name: getattr(options, name) for name in ("members", "rows", "length", "chunk")}
        return json.dumps({"job": job, "cost": asdict(cost) | {"total": cost.total}}, indent=2)
    name = Path(options.backbone).resolve().name
    head = f"{name}: {_short(cost.parameters).rstrip()} numbers; a member trains {_short(cost.trained).rstrip()}."
    return f"{head}\n{_text(cost, options)}"


def _text(cost: Cost, options: argparse.Namespace) -> str:
    at_once = min(options.chunk or options.members, options.members)
    notes = {"activations": f"  kept for the backward pass, {at_once} members at a time"}
    job = f"A step of training, members x rows x tokens = {options.members} x {options.rows} x {options.length}"
    sizes = [f"  {kind:<12}{_short(getattr(cost, kind)):>9}B{notes.get(kind, '')}" for kind in KINDS]
    work = f"  operations  {_short(cost.step):>9}FLOP, of which forward {_short(cost.forward)}FLOP"
    return "\n".join([f"{job}:", *sizes, work])


def backbone_of(folder: str, dtype: str | None = None) -> nn.Module:
    """The model that the ``config.json`` in ``folder`` describes, on the meta device: no weights are read.

    ``dtype`` is a name such as ``"bfloat16"``; by default what the config says, or float32.

    >>> from transformers import BertConfig
    >>> BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained("tiny-bert")
    >>> next(backbone_of("tiny-bert", "bfloat16").parameters()).dtype
    torch.bfloat16
    """
    import transformers

    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: give the folder of a model.")
    config = transformers.AutoConfig.from_pretrained(folder)
    chosen = getattr(torch, dtype, None) if dtype else getattr(config, "dtype", None) or torch.float32
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise ConfigError(f"--dtype {dtype}: write a dtype of floating-point numbers, such as bfloat16 or float32.")
    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config) if kind is None else kind(config)
    return model.to(chosen).eval()


def _short(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "
