"""Reads the params back out of a view, wrapped or not."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import ParamsError
from ..trees.constants import still
from .held import Viewlike, learned


def unbind(view: nn.Module) -> dict[str, Tensor]:
    """The current params of a view: detached copies, in the delta's order.

    They include running statistics that the view has learned, under the backbone's names. ``view`` may be inside a
    wrapper of one module (``DistributedDataParallel``, ``torch.compile``, an average of models).

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    >>> view = delta.bind(delta.init(0))
    >>> list(fd.unbind(view)) == list(delta.names)
    True
    >>> fd.unbind(torch.optim.swa_utils.AveragedModel(view)).keys() == fd.unbind(view).keys()
    True
    """
    found = within_wrappers(view) if isinstance(view, nn.Module) else view
    if not isinstance(found, Viewlike):
        raise ParamsError(f"unbind takes a view, as delta.bind(params) returns it, but got {type(view).__name__}.")
    about = found._funcdelta
    with about.calls.reading():
        held = {**about.leaves, **(learned(found) if about.learns else {})}
        copied = {name: leaf.detach().clone() for name, leaf in held.items()}
    return still(copied, [name for name in copied if name in about.delta.constants or name not in about.leaves])


def within_wrappers(module: nn.Module) -> nn.Module:
    """The view inside wrappers of one module each; ``module`` itself if there is none.

    >>> within_wrappers(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    found = module
    while not isinstance(found, Viewlike):
        inner = [found._modules.get(name) for name in ("module", "_orig_mod")]
        inner = [child for child in inner if child is not None]
        if not inner:
            return module
        found = inner[0]
    return found
