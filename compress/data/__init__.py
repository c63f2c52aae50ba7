"""Data: text from files, datasets or Python itself, split without overlap and served as padded batches."""

from compress.data.dataset import Data, Split
from compress.data.options import DataOptions

__all__ = ["Data", "DataOptions", "Split"]
