"""``fd.tree``: leafwise arithmetic of pytrees (:mod:`funcdelta.trees.arithmetic`)."""

from .trees.arithmetic import *  # noqa: F403
from .trees.arithmetic import __all__ as __all__
