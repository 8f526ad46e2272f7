"""Pick modules of a model on a local web page: the folded tree, what a choice costs, and the names to paste."""

from .picking import pick

__all__ = ["pick"]
