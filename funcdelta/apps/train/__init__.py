"""The main job: a sweep of members on labelled texts, all in one folded run (``funcdelta train``)."""

from .job import InterruptedRunError, run
from .options import Options, Settings

__all__ = ["InterruptedRunError", "Options", "Settings", "run"]
