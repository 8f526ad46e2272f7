"""funcdelta: delta tuning as pure pytrees of tensors on a frozen backbone.

The top level has the functions that make deltas and those that nearly every program needs. The rest is in namespaces:
``fd.algebra`` (arithmetic on the weight changes of deltas), ``fd.distributed`` (several processes), ``fd.errors``,
``fd.grad`` (derivatives), ``fd.inspect`` (trees and figures), ``fd.interop`` (other libraries' files), ``fd.methods``
(for writing your own method), ``fd.metrics``, ``fd.optim``, ``fd.recipes``, and ``fd.tree`` (leafwise arithmetic).
"""

import importlib as _importlib
import typing as _typing

from . import errors as errors
from . import methods as methods
from . import tree as tree
from .auto import AdapterModel as AdapterModel
from .auto import AutoDeltaModel as AutoDeltaModel
from .auto import BitFitModel as BitFitModel
from .auto import CompacterModel as CompacterModel
from .auto import LoraModel as LoraModel
from .auto import LowRankAdapterModel as LowRankAdapterModel
from .auto import ParallelAdapterModel as ParallelAdapterModel
from .auto import PrefixModel as PrefixModel
from .auto import SoftPromptModel as SoftPromptModel
from .deltas import AdapterConfig as AdapterConfig
from .deltas import BitFitConfig as BitFitConfig
from .deltas import CompacterConfig as CompacterConfig
from .deltas import LoraConfig as LoraConfig
from .deltas import LowRankAdapterConfig as LowRankAdapterConfig
from .deltas import ParallelAdapterConfig as ParallelAdapterConfig
from .deltas import PrefixConfig as PrefixConfig
from .deltas import SoftPromptConfig as SoftPromptConfig
from .derivatives.gradients import value_and_grad as value_and_grad
from .from_module import register_module as register_module
from .functional.tokenwise import linear as linear
from .match import find_key as find_key
from .match import find_module as find_module
from .methods.combine import average as average
from .methods.combine import chain as chain
from .methods.combine import mixture as mixture
from .methods.combine import parallel as parallel
from .methods.config import AutoDeltaConfig as AutoDeltaConfig
from .methods.config import BaseDeltaConfig as BaseDeltaConfig
from .methods.config import register as register
from .methods.site import Site as Site
from .model import DeltaModel as DeltaModel
from .trees.resident import Resident as Resident
from .trees.stack import broadcast as broadcast
from .trees.stack import cat as cat
from .trees.stack import combine as combine
from .trees.stack import members as members
from .trees.stack import partition as partition
from .trees.stack import seeds as seeds
from .trees.stack import stack as stack
from .trees.stack import take as take
from .trees.stack import unstack as unstack
from .views.unbound import unbind as unbind

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "AutoDeltaConfig",
    "AutoDeltaModel",
    "BaseDeltaConfig",
    "BitFitConfig",
    "BitFitModel",
    "CompacterConfig",
    "CompacterModel",
    "DeltaModel",
    "LoraConfig",
    "LoraModel",
    "LowRankAdapterConfig",
    "LowRankAdapterModel",
    "ParallelAdapterConfig",
    "ParallelAdapterModel",
    "PrefixConfig",
    "PrefixModel",
    "Resident",
    "Site",
    "SoftPromptConfig",
    "SoftPromptModel",
    "algebra",
    "average",
    "broadcast",
    "cat",
    "chain",
    "combine",
    "distributed",
    "errors",
    "find_key",
    "find_module",
    "grad",
    "inspect",
    "interop",
    "linear",
    "load_opendelta",
    "load_peft",
    "members",
    "methods",
    "metrics",
    "mixture",
    "optim",
    "pack",
    "parallel",
    "partition",
    "pick",
    "recipes",  # pyright: ignore[reportUnsupportedDunderAll]  (see below)
    "register",
    "register_module",
    "save_opendelta",
    "save_peft",
    "seeds",
    "stack",
    "take",
    "tree",
    "unbind",
    "unpack",
    "unstack",
    "value_and_grad",
]

if _typing.TYPE_CHECKING:
    # At run time __getattr__ imports these on first use. Recipes are missing because they import this package:
    # type checkers, too, find them by `from funcdelta import recipes`.
    from . import algebra as algebra
    from . import distributed as distributed
    from . import grad as grad
    from . import inspect as inspect
    from . import interop as interop
    from . import metrics as metrics
    from . import optim as optim
    from .apps.picker import pick as pick
    from .interop import load_opendelta as load_opendelta
    from .interop import load_peft as load_peft
    from .interop import save_opendelta as save_opendelta
    from .interop import save_peft as save_peft
    from .packing import pack as pack
    from .packing import unpack as unpack
else:  # hidden from type checkers, for which __getattr__ would make every name public
    from .habits import missing_name as _missing_name

    _NAMESPACES = (
        *("algebra", "distributed", "errors", "grad", "inspect", "interop", "methods", "metrics", "optim", "recipes"),
        "tree",
    )
    _HOMES = {
        "interop": ("load_opendelta", "load_peft", "save_opendelta", "save_peft"),
        "packing": ("pack", "unpack"),
        "apps.picker": ("pick",),
        # These can be written without their namespace, too, but are not listed in __all__.
        "errors": (
            *("CheckpointError", "ConfigError", "EngineError", "EngineWarning", "FactorMeanWarning", "FoldError"),
            *("FuncdeltaError", "MatchError", "MergeError", "ParamsError", "PickError", "RecomputeError", "StackError"),
            *("StaleBackboneError", "UnreachedWarning"),
        ),
        "inspect": ("common_names", "inspect_optimizer", "structure_graph"),
        "methods": ("Acts", "Additive", "Leaf", "Leaves", "LowRank"),
        "grad": (
            "reached",
            *("conjugate_gradient", "ghost_norms", "higher_order", "hvp", "jacobian", "jvp", "kronecker_factors"),
            *("per_sample_grads", "taps", "unroll", "vjp"),
        ),
    }
    _HOME = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name: str) -> object:
        if name in _NAMESPACES:
            return _importlib.import_module(f"{__name__}.{name}")
        if name in _HOME:
            value = getattr(_importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
            globals()[name] = value  # found without this function from now on
            return value
        homes = [] if name.startswith("_") else [home for home in _NAMESPACES if name in __getattr__(home).__all__]
        return _missing_name(name, homes)

    def __dir__() -> list[str]:
        return list(__all__)
