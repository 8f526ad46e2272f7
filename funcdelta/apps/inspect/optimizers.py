"""What an optimiser moves: counts by parameter group of torch's optimisers, or from the state of funcdelta's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ...optim import AdamState, LionState, MuonState, SGDState

State = SGDState | AdamState | LionState | MuonState


@dataclass(frozen=True)
class OptimizerGroup:
    """One parameter group. Counts are of all members of a stack together.

    Attributes:
        total_parameters, trainable_parameters: numbers in the group, and those that the optimiser moves.
        trainable_ratio: their quotient.
        options: everything else that the group holds: learning rate, betas, …

    >>> layer = torch.nn.Linear(2, 2)
    >>> fd.inspect.inspect_optimizer(torch.optim.SGD(layer.parameters(), lr=0.1), verbose=False)[0].trainable_ratio
    1.0
    """

    total_parameters: int
    trainable_parameters: int
    trainable_ratio: float
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The figures and options as a dict."""
        return asdict(self)


def inspect_optimizer(
    optimizer: torch.optim.Optimizer | State,
    params: Mapping[str, Tensor] | None = None,
    verbose: bool = True,
) -> tuple[OptimizerGroup, ...]:
    """Count what an optimiser moves, group by group; printed unless ``verbose=False``.

    ``optimizer`` is one of ``torch.optim``, whose trainable parameters are those that require grad; or the state of a
    ``fd.optim`` optimiser, one group that moves the leaves it has moments for. ``params`` are those that the state
    belongs to: with them the leaves that it does not move are counted too.

    >>> params = {"w": torch.zeros(3, 2), "scale": torch.ones(3)}
    >>> opt = fd.optim.adamw(lr=torch.tensor([1e-3, 1e-2, 1e-1]), trainable=["w"])
    >>> groups = fd.inspect.inspect_optimizer(opt.init(params), params)
    group 0: trainable 6/9 = 66.6667 %; state AdamState, step 0, members 3
    >>> groups[0].trainable_parameters
    6
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        if params is not None:
            raise ConfigError("params go with the state of an fd.optim optimiser; torch's optimisers hold their own.")
        groups = tuple(_group(group) for group in optimizer.param_groups)
    elif isinstance(optimizer, State):
        groups = (_from_state(optimizer, params),)
    else:
        raise ConfigError(
            "inspect_optimizer takes a torch.optim.Optimizer or the state of an fd.optim optimiser "
            f"(state = opt.init(params)); found {type(optimizer).__name__}."
        )
    for number, group in enumerate(groups) if verbose else ():
        counts = f"{group.trainable_parameters:,}/{group.total_parameters:,} = {group.trainable_ratio:.4%}"
        options = ", ".join(f"{name} {value}" for name, value in group.options.items())
        print(f"group {number}: trainable {counts.replace('%', ' %')}; {options}")
    return groups


def _group(group: Mapping[str, Any]) -> OptimizerGroup:
    tensors = group["params"]
    total = sum(tensor.numel() for tensor in tensors)
    trainable = sum(tensor.numel() for tensor in tensors if tensor.requires_grad)
    options = {name: value for name, value in group.items() if name != "params"}
    return OptimizerGroup(total, trainable, trainable / total if total else 0.0, options)


def _from_state(state: State, params: Mapping[str, Tensor] | None) -> OptimizerGroup:
    moments = state.momentum if isinstance(state, SGDState) else state.mu
    if isinstance(state, MuonState):
        moments = {**state.mu, **state.adam.mu}
    if params is not None:
        unknown = [name for name in moments if name not in params]
        if unknown:
            raise ConfigError(
                f"The state moves {unknown[0]!r}, which is not a leaf of params: "
                "give the params that it was made for by state = opt.init(params)."
            )
        sizes = {name: params[name].numel() for name in params}
    elif isinstance(state, SGDState) and not any(moment.numel() for moment in moments.values()):
        raise ConfigError("SGD without momentum keeps no sizes: write fd.inspect.inspect_optimizer(state, params).")
    else:
        sizes = {name: moment.numel() for name, moment in moments.items()}
    total, moved = sum(sizes.values()), sum(sizes[name] for name in moments)
    options: dict[str, Any] = {"state": type(state).__name__, "step": int(state.step.max())}
    if state.step.ndim:
        options["members"] = len(state.step)
    return OptimizerGroup(total, moved, moved / total if total else 0.0, options)
