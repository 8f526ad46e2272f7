"""What funcdelta is compared with: the bare backbone, LoRA written by hand into the modules, and PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcdelta.apps.bench.subjects import BenchError, Shape, Subject, tiny

RANK = 8
ALPHA = 16


def _example() -> tuple[Subject, dict[str, Tensor], Tensor, Tensor]:
    """A tiny subject, one member's leaves, and two members' tokens and goals, for the examples of this file."""
    subject, shape = tiny(), Shape(2, 2, 5)
    leaves: dict[str, Tensor] = {}
    for path, module in subject.backbone.named_modules():
        if path.rpartition(".")[2] in subject.targets:
            leaves[f"{path}.lora.lora_A"] = torch.full((RANK, module.in_features), 0.1)
            leaves[f"{path}.lora.lora_B"] = torch.full((module.out_features, RANK), 0.1)
    return subject, leaves, subject.tokens(shape), subject.goals(shape)


def regression_loss(hidden: Tensor, goal: Tensor) -> Tensor:
    """mean over rows and features of (mean over tokens of hidden - goal)^2: one number a member.

    hidden (..., b, s, d), goal (..., b, d) -> (...).

    >>> regression_loss(torch.ones(3, 2, 5, 4), torch.zeros(3, 2, 4))
    tensor([1., 1., 1.])
    """
    return (hidden.mean(-2) - goal).pow(2).mean((-2, -1))


def bare_step(subject: Subject, tokens: Tensor, goals: Tensor) -> Tensor:
    """The gradient of the summed loss in the input embeddings (n*b, s, d): the least a training step costs.

    >>> subject, leaves, tokens, goals = _example()
    >>> bare_step(subject, tokens, goals).shape
    torch.Size([4, 5, 16])
    """
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


def sites_of(leaves: Mapping[str, Tensor]) -> list[str]:
    """The module paths in the names `<path>.lora.lora_A`, in their order.

    >>> sites_of({"a.q.lora.lora_A": torch.ones(1), "a.q.lora.lora_B": torch.ones(1)})
    ['a.q']
    """
    return [name.removesuffix(".lora.lora_A") for name in leaves if name.endswith(".lora.lora_A")]


class HandWritten:
    """A copy of the backbone whose sites are `LoraLinear`, with the values of one member."""

    def __init__(self, subject: Subject, leaves: Mapping[str, Tensor]) -> None:
        self.model = copy.deepcopy(subject.backbone)
        self.parameters: dict[str, nn.Parameter] = {}
        self._paths: dict[str, str] = {}
        for site in sites_of(leaves):
            down, up = leaves[f"{site}.lora.lora_A"], leaves[f"{site}.lora.lora_B"]
            base = cast(nn.Linear, self.model.get_submodule(site))
            layer = LoraLinear(base, down, up, ALPHA / RANK)
            self.model.set_submodule(site, layer)
            for leaf, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
                self.parameters[f"{site}.lora.{leaf}"] = parameter
                self._paths[f"{site}.lora.{leaf}"] = f"{site}.{leaf}"

    def load(self, leaves: Mapping[str, Tensor]) -> None:
        """Writes the values of one member into the modules.

        >>> subject, leaves, tokens, goals = _example()
        >>> hand = HandWritten(subject, leaves)
        >>> hand.load({name: 2 * leaf for name, leaf in leaves.items()})
        >>> hand.parameters["layers.1.self_attn.v_proj.lora.lora_A"].unique()
        tensor([0.2000], grad_fn=<Unique2Backward0>)
        """
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(leaves[name])

    def hidden(self, tokens: Tensor) -> Tensor:
        """The output (b, s, d) for tokens (b, s).

        >>> subject, leaves, tokens, goals = _example()
        >>> HandWritten(subject, leaves).hidden(tokens[0]).shape
        torch.Size([2, 5, 16])
        """
        return self.model(input_ids=tokens).last_hidden_state

    def gradients(self, tokens: Tensor, goal: Tensor) -> dict[str, Tensor]:
        """One training step by `torch.autograd.grad`.

        >>> subject, leaves, tokens, goals = _example()
        >>> HandWritten(subject, leaves).gradients(tokens[0], goals[0]).keys() == leaves.keys()
        True
        """
        loss = regression_loss(self.hidden(tokens), goal)
        return dict(zip(self.parameters, torch.autograd.grad(loss, list(self.parameters.values())), strict=True))

    def functional_gradients(self, tokens: Tensor, goal: Tensor) -> dict[str, Tensor]:
        """One training step by `torch.func.grad` of a `functional_call`.

        >>> subject, leaves, tokens, goals = _example()
        >>> HandWritten(subject, leaves).functional_gradients(tokens[0], goals[0]).keys() == leaves.keys()
        True
        """
        return _functional_gradients(self.model, self.parameters, self._paths, tokens, goal)


class Peft:
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
        self.model: Any = wrapped.eval()
        self.parameters: list[dict[str, nn.Parameter]] = []
        self._paths: dict[str, str] = {}
        for name, leaves in zip(self.names, members, strict=True):
            self.parameters.append(self._load(name, leaves))
        self.model.set_adapter(self.names[0])

    def _load(self, adapter: str, leaves: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for site in sites_of(leaves):
            layer = self.model.base_model.model.get_submodule(site)
            for leaf in ("lora_A", "lora_B"):
                parameter = getattr(layer, leaf)[adapter].weight
                with torch.no_grad():
                    parameter.copy_(leaves[f"{site}.lora.{leaf}"])
                found[f"{site}.lora.{leaf}"] = parameter
                if adapter == self.names[0]:
                    self._paths[f"{site}.lora.{leaf}"] = f"base_model.model.{site}.{leaf}.{adapter}.weight"
        return found

    def hidden(self, tokens: Tensor) -> Tensor:
        """The output (b, s, d) of the active adapter for tokens (b, s).

        >>> subject, leaves, tokens, goals = _example()
        >>> Peft(subject, [leaves]).hidden(tokens[0]).shape
        torch.Size([2, 5, 16])
        """
        return self.model(input_ids=tokens).last_hidden_state

    def gradients(self, tokens: Tensor, goal: Tensor, index: int = 0) -> dict[str, Tensor]:
        """One training step of adapter `index`, which must be the active one, by `torch.autograd.grad`.

        >>> subject, leaves, tokens, goals = _example()
        >>> Peft(subject, [leaves]).gradients(tokens[0], goals[0]).keys() == leaves.keys()
        True
        """
        parameters = self.parameters[index]
        loss = regression_loss(self.hidden(tokens), goal)
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    def in_turn(self, tokens: Tensor, goals: Tensor) -> list[dict[str, Tensor]]:
        """One step of every member, one adapter after the other, made active by `set_adapter`.

        >>> subject, leaves, tokens, goals = _example()
        >>> len(Peft(subject, [leaves, leaves]).in_turn(tokens, goals))
        2
        """
        result = []
        for index, name in enumerate(self.names):
            self.model.set_adapter(name)
            result.append(self.gradients(tokens[index], goals[index], index))
        return result

    def without_switching(self, tokens: Tensor, goals: Tensor) -> list[dict[str, Tensor]]:
        """n steps of the active adapter, one a member's batch: what PEFT would cost if switching were free.

        >>> subject, leaves, tokens, goals = _example()
        >>> len(Peft(subject, [leaves]).without_switching(tokens, goals))
        2
        """
        return [self.gradients(batch, goal) for batch, goal in zip(tokens, goals, strict=True)]

    def functional_gradients(self, tokens: Tensor, goal: Tensor) -> dict[str, Tensor]:
        """One training step of the first adapter by `torch.func.grad` of a `functional_call`.

        >>> subject, leaves, tokens, goals = _example()
        >>> Peft(subject, [leaves]).functional_gradients(tokens[0], goals[0]).keys() == leaves.keys()
        True
        """
        return _functional_gradients(self.model, self.parameters[0], self._paths, tokens, goal)


def _functional_gradients(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    paths: Mapping[str, str],
    tokens: Tensor,
    goal: Tensor,
) -> dict[str, Tensor]:
    def loss(values: dict[str, Tensor]) -> Tensor:
        swapped = {paths[name]: value for name, value in values.items()}
        # By default torch walks every tensor of the model for ties at each call: not held against a rival.
        output = torch.func.functional_call(model, swapped, kwargs={"input_ids": tokens}, tie_weights=False)
        return regression_loss(output.last_hidden_state, goal)

    return torch.func.grad(loss)({name: parameter.detach() for name, parameter in parameters.items()})
