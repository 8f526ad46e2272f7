"""``fd.inspect``: trees and figures of models with a delta (:mod:`funcdelta.apps.inspect`)."""

from .apps.inspect import *  # noqa: F403
from .apps.inspect import __all__ as __all__
