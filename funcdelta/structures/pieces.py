"""Rows that many tables share: attention with four projections, plain and gated feed-forward networks, norms."""

from __future__ import annotations


def attention(own: str, q: str, k: str, v: str, proj: str, common: str = "attn@") -> dict[str, str]:
    """Rows of an attention module and its four projections, by their names inside it.

    >>> attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")["self_attn.o_proj"]
    'attn@.proj@'
    """
    inside = {"q": q, "k": k, "v": v, "proj": proj}
    return {own: common} | {f"{own}.{name}": f"{common}.{part}@" for part, name in inside.items()}


def feed_forward(own: str, w1: str, w2: str) -> dict[str, str]:
    """Rows of a feed-forward module and its two projections, by their names inside it.

    >>> feed_forward("mlp", "fc1", "fc2")
    {'mlp': 'ff@', 'mlp.fc1': 'ff@.w1@', 'mlp.fc2': 'ff@.w2@'}
    """
    return {own: "ff@", f"{own}.{w1}": "ff@.w1@", f"{own}.{w2}": "ff@.w2@"}


def gated(own: str, gate: str, up: str, w2: str, common: str = "ff@") -> dict[str, str | tuple[str, ...]]:
    """Rows of ``w2 (act(gate x) * up x)``: both first projections are w1.

    >>> gated("mlp", "gate_proj", "up_proj", "down_proj")["mlp.up_proj"]
    ('ff@.w1@', 'ff@.up@')
    """
    return {
        own: common,
        f"{own}.{gate}": ("ff@.w1@", "ff@.gate@"),
        f"{own}.{up}": ("ff@.w1@", "ff@.up@"),
        f"{own}.{w2}": "ff@.w2@",
    }


def final_norm(stack: str) -> tuple[str, str]:
    """The names of the norm after the last layer of a stack: ours, and OpenDelta's older one.

    >>> final_norm("decoder@")
    ('decoder@.layer_norm@', 'decoder@.final_layer_norm@')
    """
    return f"{stack}.layer_norm@", f"{stack}.final_layer_norm@"


HEAD = ("lm_head@.proj@", "lm_head@")
"""The names of a language model's head that is a single layer, both head and projection."""
