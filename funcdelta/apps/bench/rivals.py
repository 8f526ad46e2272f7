"""What funcdelta is compared with: the bare backbone, LoRA written by hand into the modules, and PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcdelta.apps.bench.subjects import BenchError, Subject

RANK = 8
ALPHA = 16


def regression_loss(hidden: Tensor, goal: Tensor) -> Tensor:
    """mean over rows and features of (mean over tokens of hidden - goal)^2: one number a member.

    hidden (..., b, s, d), goal (..., b, d) -> (...).

    >>> regression_loss(torch.ones(3, 2, 5, 4), torch.zeros(3, 2, 4))
    tensor([1., 1., 1.])
    """
    return (hidden.mean(-2) - goal).pow(2).mean((-2, -1))


def bare_step(subject: Subject, tokens: Tensor, goals: Tensor) -> Tensor:
    """The gradient of the summed loss in the input embeddings (n*b, s, d): the least a training step costs."""
    members, rows, length = tokens.shape
    inputs = subject.backbone.get_input_embeddings()(tokens.reshape(members * rows, length)).requires_grad_()
    hidden = subject.backbone(inputs_embeds=inputs).last_hidden_state
    losses = regression_loss(hidden.reshape(members, rows, length, -1), goals)
    return torch.autograd.grad(losses.sum(), inputs)[0]


class LoraLinear(nn.Module):
    """W x + b + s B (A x), with A (r, in) and B (out, r) inside the module: LoRA as one writes it by hand.

    >>> LoraLinear(nn.Linear(4, 3), torch.zeros(2, 4), torch.zeros(3, 2), 1.0)(torch.ones(5, 4)).shape
    torch.Size([5, 3])
    """

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(down.clone())
        self.lora_B = nn.Parameter(up.clone())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def adapted(subject: Subject, leaves: Mapping[str, Tensor], layer: type[Any], scale: float) -> nn.Module:
    """A copy of the backbone whose sites are `layer(base, A, B, scale)`, with the values of `leaves`."""
    model = copy.deepcopy(subject.backbone)
    for site in sites_of(leaves):
        base = cast(nn.Linear, model.get_submodule(site))
        model.set_submodule(site, layer(base, leaves[f"{site}.lora.lora_A"], leaves[f"{site}.lora.lora_B"], scale))
    return model


def sites_of(leaves: Mapping[str, Tensor]) -> list[str]:
    """The module paths in the names `<path>.lora.lora_A`, in their order.

    >>> sites_of({"a.q.lora.lora_A": torch.ones(1), "a.q.lora.lora_B": torch.ones(1)})
    ['a.q']
    """
    return [name.removesuffix(".lora.lora_A") for name in leaves if name.endswith(".lora.lora_A")]


class Rival:
    """A model with one member active: `paths` are the parameters' names in it, under the leaves' names."""

    def __init__(self, model: Any, paths: Mapping[str, str]) -> None:
        self.model, self.paths = model, paths
        self.parameters: dict[str, nn.Parameter] = {name: model.get_parameter(path) for name, path in paths.items()}

    def load(self, leaves: Mapping[str, Tensor]) -> None:
        """Writes the values of one member into the modules."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(leaves[name])

    def hidden(self, tokens: Tensor) -> Tensor:
        """The output (b, s, d) for tokens (b, s)."""
        return self.model(input_ids=tokens).last_hidden_state

    def gradients(self, tokens: Tensor, goal: Tensor, **options: Any) -> dict[str, Tensor]:
        """One training step by `torch.autograd.grad`."""
        loss = regression_loss(self.hidden(tokens), goal)
        found = torch.autograd.grad(loss, list(self.parameters.values()), **options)
        return dict(zip(self.parameters, found, strict=True))

    def functional_gradients(self, tokens: Tensor, goal: Tensor) -> dict[str, Tensor]:
        """One training step by `torch.func.grad` of a `functional_call`."""

        def loss(values: dict[str, Tensor]) -> Tensor:
            return regression_loss(self.functional(values, tokens), goal)

        return torch.func.grad(loss)({name: parameter.detach() for name, parameter in self.parameters.items()})

    def functional(self, values: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """The output (b, s, d) with the values given instead of the parameters'."""
        swapped = {self.paths[name]: value for name, value in values.items()}
        # By default torch walks every tensor of the model for ties at each call: not held against a rival.
        output = torch.func.functional_call(self.model, swapped, kwargs={"input_ids": tokens}, tie_weights=False)
        return output.last_hidden_state


class HandWritten(Rival):
    """A copy of the backbone whose sites are `LoraLinear`, with the values of one member."""

    def __init__(self, subject: Subject, leaves: Mapping[str, Tensor]) -> None:
        model = adapted(subject, leaves, LoraLinear, ALPHA / RANK)
        pairs = ((site, leaf) for site in sites_of(leaves) for leaf in ("lora_A", "lora_B"))
        super().__init__(model, {f"{site}.lora.{leaf}": f"{site}.{leaf}" for site, leaf in pairs})


class Peft(Rival):
    """PEFT's LoRA on a copy of the backbone: one adapter a member, loaded with that member's values.

    `task` is PEFT's name of what the model is for; `"CAUSAL_LM"` gives it a `generate` with adapter names.
    """

    def __init__(self, subject: Subject, members: Sequence[Mapping[str, Tensor]], task: str | None = None) -> None:
        try:
            import peft
        except ImportError as error:
            raise BenchError("the benchmark compares with PEFT: pip install 'funcdelta[test]'") from error
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(subject.targets), lora_dropout=0.0)
        config.task_type = task
        self.names = [f"member{index}" for index in range(len(members))]
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5.23 a deprecated question when it wraps a model.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            wrapped: Any = peft.get_peft_model(copy.deepcopy(subject.backbone), config, self.names[0])
            for name in self.names[1:]:
                wrapped.add_adapter(name, config)
        wrapped.eval()
        self.adapters = [Rival(wrapped, _paths(name, leaves)) for name, leaves in zip(self.names, members, strict=True)]
        for adapter, leaves in zip(self.adapters, members, strict=True):
            adapter.load(leaves)
        wrapped.set_adapter(self.names[0])
        super().__init__(wrapped, self.adapters[0].paths)

    def in_turn(self, tokens: Tensor, goals: Tensor) -> list[dict[str, Tensor]]:
        """One step of every member, one adapter after the other, made active by `set_adapter`."""
        result = []
        for name, adapter, batch, goal in zip(self.names, self.adapters, tokens, goals, strict=True):
            self.model.set_adapter(name)
            result.append(adapter.gradients(batch, goal))
        return result

    def without_switching(self, tokens: Tensor, goals: Tensor) -> list[dict[str, Tensor]]:
        """n steps of the active adapter, one a member's batch: what PEFT would cost if switching were free."""
        return [self.gradients(batch, goal) for batch, goal in zip(tokens, goals, strict=True)]


def _paths(adapter: str, leaves: Mapping[str, Tensor]) -> dict[str, str]:
    pairs = ((site, leaf) for site in sites_of(leaves) for leaf in ("lora_A", "lora_B"))
    return {f"{site}.lora.{leaf}": f"base_model.model.{site}.{leaf}.{adapter}.weight" for site, leaf in pairs}
