"""``funcdelta docs``: the reference of all public names, from their docstrings and signatures, as Markdown pages."""

from .command import run as run

__all__ = ["run"]
