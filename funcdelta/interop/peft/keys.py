"""A key of a PEFT file, taken apart: the module, what of it, and how deep it is wrapped.

``base_model.model.layers.0.q_proj.lora_A.default.weight`` is A of ``layers.0.q_proj``. What wraps the model or the
module is left out: a doubled or missing ``base_model.model.``, ``module.``, ``_orig_mod``, ``base_layer`` and
``modules_to_save.<adapter>``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import CheckpointError

FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Key:
    """What a key means.

    Attributes:
        raw: the key itself.
        path: the module's path in the file's backbone; of a backbone tensor its full name.
        factor: which factor of a LoRA it is, with ``.bias`` where it is a bias of one; ``""``: a backbone tensor.
        depth: how many ``base_layer`` stand right before the factor.
        copied: whether it stands under ``base_layer`` or ``original_module``, where PEFT keeps the backbone's own.

    >>> key = split("base_model.model.experts.base_layer.lora_A.default.weight")
    >>> key.path, key.factor, key.depth
    ('experts', 'lora_A', 1)
    """

    raw: str
    path: str
    factor: str
    depth: int = 0
    copied: bool = False
    adapter: str = ""


def split(raw: str) -> Key:
    """The parts of the key ``raw``.

    >>> split("base_model.model.classifier.modules_to_save.default.out.bias")
    Key(raw='base_model...out.bias', path='classifier.out.bias', factor='', depth=0, copied=False, adapter='default')
    """
    name = raw
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    tokens = [token for token in name.split(".") if token not in _WRAPPERS]
    at = next((i for i, token in enumerate(tokens) if token.startswith("lora_")), None)
    if at is not None:
        return _factor(raw, tokens[:at], tokens[at], tokens[at + 1 :])
    adapter = ""
    if "modules_to_save" in tokens[:-2]:
        at = tokens.index("modules_to_save")
        adapter = tokens[at + 1]
        tokens = tokens[:at] + tokens[at + 2 :]
    copied = any(token in ("base_layer", "original_module") for token in tokens)
    path = [token for token in tokens if token not in ("base_layer", "original_module")]
    return Key(raw, ".".join(path), "", copied=copied, adapter=adapter)


def _factor(raw: str, before: list[str], factor: str, after: list[str]) -> Key:
    """The key of a factor: after it come the adapter's name, if it was left in, and ``weight`` or ``bias``."""
    depth = next((i for i, token in enumerate(reversed(before)) if token != "base_layer"), len(before))
    path = ".".join(token for token in before if token != "base_layer")
    own = after[-1] if after and after[-1] in ("weight", "bias") else ""
    names = after[:-1] if own else after
    bias = ".bias" if own == "bias" else ""
    return Key(raw, path, f"{factor}{bias}", depth, adapter=".".join(names))


def split_all(keys: Iterable[str]) -> list[Key]:
    """Every key taken apart; raises ``CheckpointError`` where they are of several adapters.

    >>> split_all(["q.lora_A.one.weight", "q.lora_A.two.weight"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: The tensors are of several adapters (one, two): leave those of one ...
    """
    found = [split(key) for key in keys]
    adapters = sorted({key.adapter for key in found if key.adapter})
    if len(adapters) > 1:
        raise CheckpointError(
            f"The tensors are of several adapters ({', '.join(adapters)}): leave those of one, or save them apart with "
            f"peft_model.save_pretrained(path), which writes a folder for each."
        )
    return found
