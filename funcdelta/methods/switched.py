"""Parts of a fused output that are switched on one by one: ``(True, False, True)`` means q and v of q,k,v."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..structures.parts import Part, equal_parts
from .layers import LINEAR
from .site import Site


def check_switches(field: str, on: Any) -> None:
    """Raises ``ConfigError`` unless the config's ``field`` has a switch for each part, one of them on.

    >>> check_switches("enable_lora", (True, False, True))
    """
    if on is not None and not all(isinstance(one, bool) for one in on):
        raise ConfigError(f"{field}={on!r}: write True or False for each part, as (True, False, True).")
    if on is not None and not any(on):
        raise ConfigError(f"{field}={on} adapts nothing: set at least one part to True.")


def switched_on(site: Site, on: tuple[bool, ...]) -> tuple[Part, ...]:
    """The parts of the output that are on: those that the backbone's family has, or equal ones side by side.

    >>> from funcdelta.methods.site import site_of
    >>> [part.start for part in switched_on(site_of("qkv", torch.nn.Linear(2, 6)), (True, False, True))]
    [0, 4]
    """
    every = site.fused or equal_parts([str(i) for i in range(len(on))], site.width)
    return tuple(part for part, is_on in zip(every, on, strict=True) if is_on)


def misfit(site: Site, field: str, on: tuple[bool, ...], is_named: bool) -> str | None:
    """Why the switches of the config's ``field`` do not fit the output; ``is_named``: it names parts elsewhere, too.

    >>> from funcdelta.methods.site import site_of
    >>> misfit(site_of("qkv", torch.nn.Linear(2, 7)), "enable_lora", (True, False), False)
    'enable_lora has 2 equal parts, but it has 7 outputs'
    """
    if site.kind not in LINEAR:
        return f"{field} splits fused linear projections, not {site.module_type}"
    if site.fused and len(site.fused) != len(on):
        names = ", ".join(part.name for part in site.fused)
        return f"{field} has {len(on)} parts, but its output has {len(site.fused)}: {names}"
    if not site.fused and site.width % len(on):
        return f"{field} has {len(on)} equal parts, but it has {site.width} outputs"
    if is_named and site.parts and set(site.parts) != set(switched_on(site, on)):
        names = ", ".join(part.name for part in site.parts)
        return f"{field}={on} means other parts than modified_modules, which name {names}"
    return None
