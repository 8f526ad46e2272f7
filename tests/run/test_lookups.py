"""A token that is padding gives its row no gradient, for every member and by every way of calling."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from custom_methods import RowScaleConfig
from torch import Tensor, nn

import funcdelta as fd

TOKENS = torch.tensor([[2, 1, 2], [3, 2, 8]])


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


CONFIGS: dict[str, Callable[[], fd.BaseDeltaConfig]] = {
    "trained": lambda: fd.LoraConfig(modified_modules=["1"], unfrozen_modules=["deltas", "0"]),
    "rewritten": lambda: RowScaleConfig(modified_modules=["0"]),
    "a parameter": lambda: fd.LoraConfig(modified_modules=["0.weight"]),
}


@pytest.mark.parametrize("layer", [nn.Embedding, Scaled])
@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_those_of_each_member_alone(config: str, layer: type[nn.Embedding]) -> None:
    torch.manual_seed(0)
    delta = fd.DeltaModel(nn.Sequential(layer(9, 6, padding_idx=2), nn.Linear(6, 6)).eval(), CONFIGS[config]())
    stack = {
        name: leaf if name in delta.constants else leaf + torch.rand_like(leaf)
        for name, leaf in delta.init(0, n=3).items()
    }

    def alone(params: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return delta.apply(params, tokens).square().sum()

    def close(found: dict[str, Tensor], expected: list[dict[str, Tensor]]) -> None:
        for name in stack.keys() - set(delta.constants):
            torch.testing.assert_close(found[name], torch.stack([one[name] for one in expected]), rtol=1e-4, atol=1e-4)

    each = [torch.func.grad(alone)(fd.take(stack, i), TOKENS) for i in range(3)]
    for engine in ("loop", "vmap", "fold"):
        losses = lambda s, engine=engine: delta.apply_many(s, TOKENS, engine=engine).square().sum((1, 2, 3))  # noqa: E731
        close(fd.value_and_grad(losses)(stack)[1], each)
    own = torch.stack([TOKENS, TOKENS.flip(0), torch.full_like(TOKENS, 2)])
    close(
        torch.vmap(torch.func.grad(alone))(stack, own),
        [torch.func.grad(alone)(fd.take(stack, i), own[i]) for i in range(3)],
    )
    rows = torch.func.grad(lambda s: delta.apply_rows(s, [2, 1], TOKENS).square().sum())(stack)
    nothing = {name: torch.zeros_like(leaf[0]) for name, leaf in stack.items()}
    close(rows, [nothing, *(torch.func.grad(alone)(fd.take(stack, i), TOKENS[2 - i : 3 - i]) for i in (1, 2))])
