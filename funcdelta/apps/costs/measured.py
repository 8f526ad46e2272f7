"""What n members take, from one member's run on the meta device: exact bytes, and operations by torch's own counter.

The backbone counts once and everything else n times: members are independent, so n of them in one batch multiply n
times what one multiplies. Nothing is computed, and a backbone of any size takes no memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ...errors import ConfigError
from ...model import DeltaModel
from ...optim import adamw
from ...plan.sharing import expand_member
from ...run.single import call_single
from .fused import FusedAttention


@dataclass(frozen=True)
class Cost:
    """Numbers, bytes and operations (a multiplication and an addition are two) of one step of training n members.

    Attributes:
        parameters: numbers of the backbone, each tensor once.
        trained: numbers of one member that train.
        backbone, members, gradients, optimiser: bytes; the optimiser is AdamW with a learning rate a member.
        activations: bytes that the forward pass of ``chunk`` members keeps for the backward pass. What one layer needs
            while it runs comes on top.
        forward, step: operations in the products of a forward pass, and of forward and backward together, in which
            fused attention computes its scores a second time.

    >>> Cost(5, 2, 20, 8, 8, 24, 100, 1000, 2500).total
    160
    """

    parameters: int
    trained: int
    backbone: int
    members: int
    gradients: int
    optimiser: int
    activations: int
    forward: int
    step: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.backbone + self.members + self.gradients + self.optimiser + self.activations


def measure(delta: DeltaModel, members: int = 1, rows: int = 1, length: int = 512, chunk: int | None = None) -> Cost:
    """The cost of one step of ``members``, each with ``rows`` rows of ``length`` tokens, ``chunk`` of them at a time.

    The backbone of ``delta`` takes token ids and is on the meta device. The loss is a cross-entropy at every position,
    without dropout.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    >>> with torch.device("meta"):
    ...     backbone = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()
    >>> cost = measure(fd.LoraModel(backbone, lora_r=2, modified_modules=["q_proj"]), members=3, length=8)
    >>> cost.trained, cost.members, cost.gradients
    (128, 1560, 1560)
    """
    for name, parameter in delta.backbone.named_parameters():
        if not parameter.is_meta:
            raise ConfigError(
                f"{name} is on {parameter.device}: build the backbone on the meta device, as backbone_of(folder) does."
            )
    inputs = _inputs(delta.backbone, rows, length)
    stack = delta.init(0, n=1, device="meta")
    leaves = {name: leaf[0].detach().requires_grad_(leaf.is_floating_point()) for name, leaf in stack.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as forward, FusedAttention():
        _loss(delta, leaves, inputs)
    kept = _Kept([*delta.backbone.parameters(), *delta.backbone.buffers(), *leaves.values()])
    with FlopCounterMode(display=False) as step, FusedAttention():
        with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor):
            loss = _loss(delta, leaves, inputs)
        loss.backward()
    state = adamw(lr=torch.ones(1, device="meta")).init(stack)
    return Cost(
        parameters=sum(parameter.numel() for parameter in delta.backbone.parameters()),
        trained=sum(leaf.numel() for name, leaf in leaves.items() if delta.trainable(name)),
        backbone=_bytes([*delta.backbone.parameters(), *delta.backbone.buffers()]),
        members=members * _bytes(stack),
        gradients=members * _bytes([leaf for leaf in leaves.values() if leaf.requires_grad]),
        optimiser=members * _bytes(state),
        activations=min(chunk or members, members) * kept.bytes,
        forward=members * forward.get_total_flops(),
        step=members * step.get_total_flops(),
    )


class _Kept:
    """The storages that autograd keeps, without those of the ``given`` tensors, which exist anyway."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        # Held, so that no later storage gets the address of an earlier one.
        self._found: dict[int, Any] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._found[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for key, storage in self._found.items() if key not in self._given)


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _inputs(backbone: Any, rows: int, length: int) -> dict[str, Tensor]:
    """Token ids for the backbone, and for its decoder where it has one of its own."""
    name = getattr(backbone, "main_input_name", None)
    if name != "input_ids":
        raise ConfigError(
            f"{type(backbone).__name__} reads {name or 'no named input'}: give a model that takes input_ids."
        )
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    return {name: ids, "decoder_input_ids": ids} if backbone.config.is_encoder_decoder else {name: ids}


def _loss(delta: DeltaModel, leaves: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    # Past delta.apply, which refuses leaves without numbers.
    program = delta.program
    output = call_single(program, expand_member(program.skeletons.plan.shared, leaves), (), dict(inputs))[0]
    return F.cross_entropy(output.flatten(0, -2), torch.zeros(output[..., 0].numel(), dtype=torch.long, device="meta"))
