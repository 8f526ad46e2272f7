"""Converts names and modules in OpenDelta's files to sites, and sites to names that match exactly those."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ...match import within
from ...methods.config import BaseDeltaConfig
from ...model import DeltaModel
from ...plan.spans import pair
from .common_names import EXCLUDED, named_sites
from .spelling import Spelling

Sites = dict[str, str]
"""``{site: module where its delta ends}``; the two differ only for spans."""


def sites_of(delta: DeltaModel) -> Sites:
    """The sites of a delta, each with its end.

    >>> sites_of(fd.LoraModel(nn.Sequential(nn.Linear(2, 2)), modified_modules=["0"]))
    {'0': '0'}
    """
    return {a.site.path: a.site.exit or a.site.path for a in delta.plan.all()}


def sites_at(backbone: nn.Module, config: BaseDeltaConfig, spelling: Spelling, paths: Iterable[str]) -> list[str]:
    """The sites that correspond to OpenDelta's modules ``paths``, in the backbone's order.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> from .spelling import SPELLINGS
    >>> sites_at(backbone, fd.LoraConfig(), SPELLINGS["lora"], ["1", "0"])
    ['0', '1']
    """
    modules = dict(backbone.named_modules(remove_duplicate=False))
    own = (config.own_sites(backbone) or []) if not spelling.sites else []
    found: set[str] = set()
    for path in paths:
        found |= {site for site in own if within(site, path)} if own else set(config.spread(path, modules[path]))
    return [path for path in modules if path in found]


def named(backbone: nn.Module, config: BaseDeltaConfig, spelling: Spelling, data: Mapping[str, object]) -> Sites | None:
    """The sites that the fields of a ``config.json`` name by OpenDelta's rules; ``None`` if they cannot be determined.

    OpenDelta pairs the ends of spans by counting modules; here the ends in one block form a pair. The result is the
    same if OpenDelta counted correctly; if not, the keys of the file are at other sites than these.

    >>> from .spelling import SPELLINGS
    >>> data = {"modified_modules": ["0", "1"], "exclude_modules": ["1"]}
    >>> named(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), fd.AdapterConfig(), SPELLINGS["adapter"], data)
    {'0': '0'}
    """
    names = data.get("modified_modules")
    if not isinstance(names, (list, tuple)) or not spelling.sites:
        return None
    given = data.get("exclude_modules") if spelling.heeds_exclusion else None
    excluded = given if isinstance(given, (list, tuple)) else EXCLUDED
    common = bool(data.get("common_structure"))
    if not config.gives("spans"):
        paths = named_sites(backbone, names, excluded, common)
        return None if paths is None else {site: site for site in sites_at(backbone, config, spelling, paths)}
    sites: Sites = {}
    for entry, end in config.spans(tuple(names)):
        entries, ends = (named_sites(backbone, [name], excluded, common) for name in (entry, end))
        if entries is None or ends is None:
            return None
        sites |= dict(zip(entries, ends, strict=True)) if entries == ends else dict(pair(entries, ends))
    return {path: sites[path] for path, _ in backbone.named_modules() if path in sites}


def flat(sites: Sites, spans: bool) -> list[str]:
    """The sites as a list; with ``spans``, each beginning is followed by its end.

    >>> flat({"w1": "w2"}, spans=True), flat({"q": "q"}, spans=False)
    (['w1', 'w2'], ['q'])
    """
    return [path for span in sites.items() for path in span] if spans else list(sites)
