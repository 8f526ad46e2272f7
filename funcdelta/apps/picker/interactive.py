"""``interactive_modify``: the modules of a delta are picked while it is built."""

from __future__ import annotations

from torch import nn

from ...errors import ConfigError
from ...methods.config import BaseDeltaConfig
from .choice import at
from .picking import pick


def picked(model: nn.Module, config: BaseDeltaConfig, interactive_modify: bool | int) -> BaseDeltaConfig:
    """``config`` at the modules picked on the page; ``True`` serves it on any free port, a number on that one.

    >>> config = fd.LoraConfig(modified_modules=["0"])
    >>> picked(torch.nn.Sequential(torch.nn.Linear(4, 8)), config, True)
    Traceback (most recent call last):
    ...
    funcdelta.errors.ConfigError: interactive_modify picks the modules, and modified_modules=['0'] names them...
    """
    for field in ("modified_modules", "exclude_modules"):
        given = getattr(config, field)
        if given is not None:
            raise ConfigError(
                f"interactive_modify picks the modules, and {field}={list(given)} names them: give one of the two."
            )
    if config.common_structure:
        raise ConfigError("interactive_modify picks modules by their own names: leave out common_structure=True.")
    port = 0 if interactive_modify is True else interactive_modify
    return at(config, pick(model, port, config=config, compact=True))
