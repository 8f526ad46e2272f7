"""Soft prompt: trained rows before the embedded input, ``x' = [E; embed(ids)]``.

Shapes: ``soft_embeds`` (P, d), where d is the width of the token embeddings. The rows enter the model like embedded
tokens, after any scaling by the embedding. Masks, token types, position numbers and labels are extended on copies;
outputs with one value per position are P longer unless ``strip``. The prompt comes right before the text: a row padded
in front becomes ``[0; E; text]``, and counted from the end, the text stays in its place. Encoders keep E first, as in
OpenDelta, because BERT's pooler reads position 0. Source: Lester et al. 2021, "The Power of Scale for
Parameter-Efficient Prompt Tuning".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..methods.acts import Acts
from ..methods.config import BaseDeltaConfig, register
from ..methods.leaf import Leaves
from ..methods.own import Own
from ..methods.site import Site
from ..run.entrance import embedded_tokens, entrances, why_not
from ..run.lengthened import EXPAND
from ..run.text_model import input_embedding


@register("soft_prompt")
@dataclass(frozen=True)
class SoftPromptConfig(BaseDeltaConfig):
    """Prompt tuning, ``[E; embed(ids)]``, where token ids enter: an encoder-decoder's encoder, or the transformer.

    Attributes:
        soft_token_num: the number P of rows.
        init_range: without ``token_init``, rows start as U(±init_range).
        token_init: whether rows start as copies of the embeddings of tokens 0 … P-1, the same for every member.
        other_expand_ids: pairs of an input's name and its value at the prompt's positions.
        strip: whether to remove the prompt's positions from hidden states and logits (an encoder's states keep them
            for its decoder). They are always removed for classification heads that look for the last token in
            ``input_ids``.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> backbone = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).eval()
    >>> delta = fd.DeltaModel(backbone, fd.SoftPromptConfig(soft_token_num=3))
    >>> params, ids = delta.init(seed=0), torch.tensor([[5, 6, 7, 8]])
    >>> {name: tuple(leaf.shape) for name, leaf in params.items()}
    {'transformer.soft_prompt_layer.soft_embeds': (3, 8)}
    >>> delta.apply(params, input_ids=ids).logits.shape
    torch.Size([1, 7, 20])
    """

    default_name: ClassVar[str] = "soft_prompt_layer"
    in_leaves: ClassVar[tuple[str, ...]] = ("soft_token_num", "init_range", "token_init")
    least: ClassVar[Mapping[str, float]] = {"soft_token_num": 1, "init_range": 0}

    soft_token_num: int = 100
    init_range: float = 0.5
    token_init: bool = True
    other_expand_ids: tuple[tuple[str, float], ...] = EXPAND
    strip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_dim != 0:
            raise ConfigError(f"batch_dim={self.batch_dim}: a prompt is added along axis 1, so write batch_dim=0.")
        given = self.other_expand_ids
        pairs = given.items() if isinstance(given, Mapping) else given
        try:
            pairs = tuple((name, value) for name, value in pairs)
        except (TypeError, ValueError):
            pairs = (("", None),)
        if not all(isinstance(name, str) and name and isinstance(value, (int, float)) for name, value in pairs):
            raise ConfigError(
                f"other_expand_ids={given!r}: write pairs of an input's name and a number, such as "
                f'(("attention_mask", 1), ("token_type_ids", 0)).'
            )
        object.__setattr__(self, "other_expand_ids", pairs)

    def own_sites(self, backbone: nn.Module) -> list[str]:
        return entrances(backbone, self.delta_type)

    def describe(self, site: Site, module: nn.Module) -> Site:
        refusal, table = why_not(module), input_embedding(module)
        if refusal is not None or table is None:
            return dataclasses.replace(site, options=(("refusal", refusal),))
        width, vocabulary = table.embedding_dim, table.num_embeddings
        return dataclasses.replace(
            site, in_features=width, out_features=width, options=(("refusal", None), ("vocabulary", vocabulary))
        )

    def check(self, site: Site) -> str | None:
        if site.option("refusal") is not None:
            return site.option("refusal")
        if self.token_init and self.soft_token_num > site.option("vocabulary"):
            return (
                f"token_init=True copies {self.soft_token_num} tokens, but the vocabulary has "
                f"{site.option('vocabulary')}; write token_init=False"
            )
        return None

    def unmergeable(self, site: Site) -> str | None:
        return "rows before the input are not a function of the weights"

    def leaves(self, site: Site, own: Own, rng: torch.Generator) -> Leaves:
        if not self.token_init:
            rows = (2 * torch.rand(self.soft_token_num, site.width, generator=rng) - 1) * self.init_range
            return {"soft_embeds": rows}
        table = input_embedding(own.module)
        assert table is not None
        return {"soft_embeds": embedded_tokens(table, self.soft_token_num)}

    def acts(self, site: Site) -> Acts:
        return dataclasses.replace(super().acts(site), expand_ids=dict(self.other_expand_ids), strip=self.strip)

    def prompt(self, site: Site, p: dict[str, Tensor]) -> Tensor:
        return p["soft_embeds"]
