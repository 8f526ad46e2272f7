"""What conditions of a call are tested on: tiny models, texts with every padding, and LoReFT's formula row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from custom_methods import LoreftConfig
from torch import Tensor, nn

import funcdelta as fd


@dataclass(frozen=True)
class GatedConfig(fd.BaseDeltaConfig):
    """``y + gate · shift``, with a gate that the caller gives each row."""

    delta_type: ClassVar[str] = "told_gated"
    conditions: ClassVar[tuple[str, ...]] = ("gate",)

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        return {"shift": torch.zeros(site.width)}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + p["call.gate"].view(-1, *[1] * (y.ndim - 1)) * p["shift"]


@dataclass(frozen=True)
class SeenConfig(fd.BaseDeltaConfig):
    """Changes nothing, and puts down what the call tells."""

    delta_type: ClassVar[str] = "told_seen"
    conditions: ClassVar[tuple[str, ...]] = ("mask", "positions", "lengths", "cached")
    seen: ClassVar[list[dict[str, Tensor]]] = []

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        return {"one": torch.ones(())}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        self.seen.append({name.removeprefix("call."): p[name] for name in p if name.startswith("call.")})
        return y * p["one"]


GATES = torch.tensor([0.0, 1.0, -2.0, 3.0])

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": None}


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **SPECIAL)).eval()


def gpt2() -> nn.Module:
    # With a padding token and no mask GPT-2 reads its ids in Python, to warn.
    special = SPECIAL | {"pad_token_id": None}
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, **special)
    return transformers.GPT2LMHeadModel(config).eval()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    sizes: dict[str, Any] = {
        f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")
    }
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, **sizes
    )
    return transformers.BartForConditionalGeneration(config).eval()


# Each with a whole layer, whose output may be a tuple, and a module inside of one.
DECODERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "llama": (llama, ("model.layers.0", "model.layers.1.mlp")),
    "gpt2": (gpt2, ("transformer.h.0", "transformer.h.1.mlp.c_fc")),
}
READERS = {**DECODERS, "bert": (bert, ("encoder.layer.0", "encoder.layer.1.intermediate.dense"))}
PAIRS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]] = {
    "t5": (t5, ("encoder.block.0", "encoder.block.1.layer.1"), ("decoder.block.0.layer.0", "decoder.block.1.layer.1")),
    "bart": (bart, ("model.encoder.layers.0", "model.encoder.layers.1.fc2"), ("model.decoder.layers.0.fc1",)),
}
MASKS = {
    "none": None,
    "whole": [[1] * 6, [1] * 6, [1] * 6, [1] * 6],
    "right": [[1] * 6, [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    "left": [[1] * 6, [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]],
    "ragged": [[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0]],
}


def built(make: Callable[[], nn.Module], sites: tuple[str, ...], **fields: Any) -> fd.DeltaModel:
    torch.manual_seed(0)
    return fd.DeltaModel(make(), LoreftConfig(modified_modules=sites, **fields))


def random_stack(delta: fd.DeltaModel, n: int = 3) -> dict[str, Tensor]:
    return fd.tree.randn_like(delta.init(0, n=n), seed=1)


def text(mask: Any, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(4, 40, (4, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": torch.tensor(mask)}


def ends(mask: Any, first: int = 1, last: int = 2) -> list[set[int]]:
    """The tokens of each row that LoReFT changes."""
    rows = [[1] * 6] * 4 if mask is None else mask
    real = [[at for at, one in enumerate(row) if one] for row in rows]
    return [{*row[:first], *row[max(len(row) - last, 0) :]} for row in real]


@contextmanager
def by_hand(model: nn.Module, params: dict[str, Tensor], chosen: dict[str, list[set[int]]]) -> Iterator[None]:
    """A block in which hooks on the bare model change the ``chosen`` tokens of each row at each site."""

    def hook(path: str, tokens: list[set[int]]) -> Callable[..., Any]:
        rotate = torch.linalg.qr(params[f"{path}.test_loreft.rotate"].T).Q.T
        project, bias = params[f"{path}.test_loreft.project"], params[f"{path}.test_loreft.bias"]

        def change(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden.clone()
            for row, own in enumerate(tokens):
                for at in own:
                    h = hidden[row, at]
                    changed[row, at] = h + rotate.T @ (project @ h + bias - rotate @ h)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return change

    handles = [model.get_submodule(path).register_forward_hook(hook(path, own)) for path, own in chosen.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def told(delta: fd.DeltaModel, params: dict[str, Tensor] | None = None, **batch: Any) -> dict[str, Tensor]:
    """What the last site was told."""
    SeenConfig.seen.clear()
    with torch.no_grad():
        delta.apply(delta.init(0) if params is None else params, **batch)
    return SeenConfig.seen[-1]


def seeing(make: Callable[[], nn.Module], *sites: str, example: Any = None, **fields: Any) -> fd.DeltaModel:
    torch.manual_seed(0)
    return fd.DeltaModel(make(), SeenConfig(modified_modules=sites, **fields), example=example)


def gated(make: Callable[[], nn.Module] = llama, sites: tuple[str, ...] = ("layers.0", "layers.1.mlp")) -> Any:
    torch.manual_seed(0)
    delta = fd.DeltaModel(make(), GatedConfig(modified_modules=sites))
    return delta, random_stack(delta)


def row_by_row(delta: fd.DeltaModel, params: dict[str, Tensor], batch: dict[str, Tensor], gates: Tensor) -> Tensor:
    """What each row gives alone, with its shift multiplied by its gate."""
    found = []
    for row in range(len(gates)):
        own = {key: value[row : row + 1] for key, value in batch.items()}
        scaled = {key: leaf * gates[row] for key, leaf in params.items()}
        found.append(delta.apply(scaled, **own, conditions={"gate": torch.ones(())})[0])
    return torch.cat(found)
