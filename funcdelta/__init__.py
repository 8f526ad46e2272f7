"""funcdelta: delta tuning as pure pytrees of tensors on a frozen backbone."""

import typing as _typing

from . import algebra as algebra
from . import distributed as distributed
from . import metrics as metrics
from . import optim as optim
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
from .config import AutoDeltaConfig as AutoDeltaConfig
from .config import BaseDeltaConfig as BaseDeltaConfig
from .config import register as register
from .deltas import AdapterConfig as AdapterConfig
from .deltas import BitFitConfig as BitFitConfig
from .deltas import CompacterConfig as CompacterConfig
from .deltas import LoraConfig as LoraConfig
from .deltas import LowRankAdapterConfig as LowRankAdapterConfig
from .deltas import ParallelAdapterConfig as ParallelAdapterConfig
from .deltas import PrefixConfig as PrefixConfig
from .deltas import SoftPromptConfig as SoftPromptConfig
from .derivatives.directions import conjugate_gradient as conjugate_gradient
from .derivatives.directions import hvp as hvp
from .derivatives.directions import jacobian as jacobian
from .derivatives.directions import jvp as jvp
from .derivatives.directions import per_sample_grads as per_sample_grads
from .derivatives.directions import vjp as vjp
from .derivatives.gradients import value_and_grad as value_and_grad
from .derivatives.reach import reached as reached
from .derivatives.taps import Tap as Tap
from .derivatives.taps import ghost_norms as ghost_norms
from .derivatives.taps import kronecker_factors as kronecker_factors
from .derivatives.taps import taps as taps
from .derivatives.unrolling import unroll as unroll
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import EngineError as EngineError
from .errors import EngineWarning as EngineWarning
from .errors import FactorMeanWarning as FactorMeanWarning
from .errors import FoldError as FoldError
from .errors import FuncdeltaError as FuncdeltaError
from .errors import MatchError as MatchError
from .errors import MergeError as MergeError
from .errors import ParamsError as ParamsError
from .errors import PickError as PickError
from .errors import RecomputeError as RecomputeError
from .errors import StackError as StackError
from .errors import StaleBackboneError as StaleBackboneError
from .errors import UnreachedWarning as UnreachedWarning
from .from_module import register_module as register_module
from .functional.attention import higher_order as higher_order
from .functional.tokenwise import linear as linear
from .inspect import DeltaStatistics as DeltaStatistics
from .inspect import OptimizerGroup as OptimizerGroup
from .inspect import frozen_parameters_names as frozen_parameters_names
from .inspect import inspect_optimizer as inspect_optimizer
from .inspect import num_total_parameters as num_total_parameters
from .inspect import num_trainable_parameters as num_trainable_parameters
from .inspect import structure_graph as structure_graph
from .inspect import trainable_parameters_names as trainable_parameters_names
from .interop.opendelta import load_opendelta as load_opendelta
from .interop.opendelta import save_opendelta as save_opendelta
from .match import find_key as find_key
from .match import find_module as find_module
from .model import DeltaModel as DeltaModel
from .packing.unlike import pack as pack
from .packing.unlike import unpack as unpack
from .picker import pick as pick
from .sites.site import Site as Site
from .stacks.params import broadcast as broadcast
from .stacks.params import cat as cat
from .stacks.params import combine as combine
from .stacks.params import members as members
from .stacks.params import partition as partition
from .stacks.params import seeds as seeds
from .stacks.params import stack as stack
from .stacks.params import take as take
from .stacks.params import unstack as unstack
from .stacks.resident import Resident as Resident
from .structures import common_names as common_names
from .views.unbound import unbind as unbind

DeltaBase = DeltaModel

if not _typing.TYPE_CHECKING:  # a type checker would then take every name for a public one
    from .habits import function_of_opendelta as __getattr__  # noqa: F401  (called by Python)
