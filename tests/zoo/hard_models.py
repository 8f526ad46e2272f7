"""A second zoo: tiny models that broke libraries of deltas, each with the right answer written out by hand.

``HARD`` maps a name to its ``Hard``. What a member does to one of them is known without the library: a model built
anew whose weights are ``W + s B A``, and whose trained leaves are the member's (``written``).
"""

from __future__ import annotations

import torch
from hard_case import Batch, Hard, weights_of, written, written_call
from hard_plain import PLAIN
from hard_transformers import TRANSFORMERS
from zoo import ZOO, cast, convert

__all__ = ["EVERY", "FROM_ZOO", "HARD", "Batch", "Hard", "weights_of", "written", "written_call"]

HARD: dict[str, Hard] = {hard.name: hard for hard in (*PLAIN, *TRANSFORMERS)}


def from_zoo(name: str) -> Hard:
    """An architecture of the first zoo as a hard model: without a mask, with one, and with a shorter one."""
    architecture = ZOO[name]
    masked = "mask" in architecture.flags

    def inputs(rows: int, seed: int, variant: int) -> Batch:
        batch = cast(architecture.inputs(rows, seed, variant > 0), torch.float64)
        if "args" in batch:
            return {"images": batch["args"][0]}
        return convert(batch, lambda value: value[:, :4] if variant == 2 and masked else value)

    flags = {"folds", "routes"} - ({"folds", "routes"} if architecture.flags & {"moe", "batch_free_target"} else set())
    return Hard(
        f"zoo_{name}",
        architecture.build,
        inputs,
        (architecture.default_target, architecture.linears[1]),
        trained=(architecture.head,),
        output=architecture.output,
        flags=frozenset(flags | ({"float32"} if "float32_inside" in architecture.flags else set())),
        variants=3 if masked else 1,
        weights=0.2,
    )


FROM_ZOO: dict[str, Hard] = {
    f"zoo_{name}": from_zoo(name) for name in ("bert", "gpt2", "llama", "mixtral", "t5", "conv2d")
}
EVERY: dict[str, Hard] = {**HARD, **FROM_ZOO}
