"""The whole list, in the order of the table."""

from . import compositions_model, compositions_run  # noqa: F401  they add to it
from .compositions import COMPOSITIONS

__all__ = ["COMPOSITIONS"]
