"""Which layout fits: one device, members over devices, the backbone over devices, or both.

Members exchange nothing while they train. A sharded backbone is gathered by layers in every pass (two a chunk in
training, one in generation), ``w N (k - 1) / k`` bytes into each of k devices, while it computes: the longer counts.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ..errors import ConfigError
from .devices import Device
from .formulas import Cost, Job, decode_cost, training_cost
from .sizes import Backbone, Member


@dataclass(frozen=True)
class Placed:
    """One layout: on how many devices, in how many parts the backbone, and what one device then has.

    ``seconds`` is a step of all members, ``exchange`` the part of it that gathering takes if nothing hides it.
    ``why_not`` says why it is impossible, if it is.
    """

    layout: str
    devices: int
    shards: int
    members: int
    cost: Cost
    exchange: float
    fits: bool
    why_not: str = ""

    @property
    def seconds(self) -> float:
        """Of one step."""
        return max(self.cost.seconds, self.exchange)


def layouts(
    backbone: Backbone,
    member: Member,
    job: Job,
    device: Device,
    devices: int = 1,
    shards: int | None = None,
    decode: bool = False,
) -> list[Placed]:
    """The layouts that ``devices`` allow, simplest first; ``shards`` a backbone in the mixed one (else the least).

    >>> from funcdelta.costs import DEVICES, from_numbers
    >>> found = layouts(*from_numbers(layers=80, width=8192), Job(64, length=512, chunk=4), DEVICES["h100"], 8)
    >>> [(placed.layout, placed.members, placed.fits) for placed in found]
    [('one device', 64, False), ('members sharded', 8, False), ('both', 8, False), ('backbone sharded', 8, True)]
    """
    if devices < 1:
        raise ConfigError(f"{devices} devices: give at least one.")
    if shards is not None and (devices % shards or not 1 <= shards <= devices):
        raise ConfigError(f"{shards} shards do not divide {devices} devices evenly.")
    found = [_place("one device", backbone, member, job, device, 1, 1, decode)]
    if devices == 1:
        return found
    found.append(_place("members sharded", backbone, member, job, device, devices, 1, decode))
    between = [k for k in range(2, devices) if devices % k == 0 and shards in (None, k)]
    mixed = [_place("both", backbone, member, job, device, devices, k, decode) for k in between]
    if mixed:
        found.append(next((placed for placed in mixed if placed.fits), mixed[-1]))
    if shards in (None, devices):
        found.append(_place("backbone sharded", backbone, member, job, device, devices, devices, decode))
    return found


def _place(
    layout: str, backbone: Backbone, member: Member, job: Job, device: Device, devices: int, shards: int, decode: bool
) -> Placed:
    each, why_not = math.ceil(job.members / devices), ""
    own = dataclasses.replace(job, members=each)
    if job.members < devices:
        # Members are fewer than devices: several devices share one member's rows.
        sharing = devices // job.members
        own = dataclasses.replace(job, members=1, rows=math.ceil(job.rows / sharing))
        if job.rows < sharing:
            why_not = f"{job.members} members of {job.rows} rows leave some of {devices} devices without work"
    cost = (decode_cost if decode else training_cost)(backbone, member, own, device, shards)
    whole = device.weight_bytes * backbone.parameters
    exchange = (1 if decode else 2 * own.chunks) * whole * (shards - 1) / shards / device.link
    fits = not why_not and cost.total <= device.memory
    return Placed(layout, devices, shards, own.members, cost, exchange, fits, why_not)


def advice(found: list[Placed]) -> str:
    """One sentence: the simplest layout that fits and the fastest one, or what to change.

    >>> from funcdelta.costs import DEVICES, from_numbers
    >>> print(advice(layouts(*from_numbers(layers=16, width=2048), Job(8, length=128), DEVICES["a100"], 2)))
    one device fits; fastest: members sharded (2.0 x).
    """
    fitting = [placed for placed in found if placed.fits]
    if not fitting:
        least = min(found, key=lambda placed: placed.cost.total)
        largest = max(least.cost.memory, key=lambda kind: least.cost.memory[kind])
        hint = {
            "backbone": "more devices (--devices)",
            "activations": "fewer members at a time (--chunk), or shorter rows",
            "cache": "fewer rows or a shorter context",
        }.get(largest, "more devices (--devices), or a lower rank")
        return f"nothing fits; in {least.layout} most memory is {largest}: try {hint}."
    simplest, fastest = fitting[0], min(fitting, key=lambda placed: placed.seconds)
    if fastest.layout == simplest.layout:
        return f"{simplest.layout} fits, and is the fastest that does."
    ratio = simplest.seconds / fastest.seconds
    return f"{simplest.layout} fits; fastest: {fastest.layout} ({ratio:.1f} x)."
