"""hf-compress: smaller and faster transformers, measured.

Importing this package imports neither torch nor transformers, yet lets plain `from_pretrained` load what it saved.
"""

from __future__ import annotations

import importlib
from typing import Any

from compress import hook
from compress.errors import CompressError

EXPORTS = {
    "compress": "compress.api",
    "Result": "compress.api",
    "Plan": "compress.plan",
    "Target": "compress.target",
    "Layout": "compress.layout",
    "layout_of": "compress.families",
    "load": "compress.checkpoint",
    "save": "compress.checkpoint",
}
MARKS = {"passes": "PASSES", "exporters": "EXPORTERS"}  # other projects on PyPI use these names as well

__all__ = ["CompressError", "check_installation", *EXPORTS]


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first asked for."""
    if name not in EXPORTS:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    return getattr(importlib.import_module(EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])


def check_installation() -> None:
    """Raise CompressError, naming the file found, where another project's package stands in place of one of ours."""
    for name, mark in MARKS.items():
        try:
            package = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise CompressError(f"package '{name}' can't be imported ({error}); reinstall hf-compress") from error
        if not hasattr(package, mark):
            found = getattr(package, "__file__", None) or list(package.__path__)
            raise CompressError(
                f"package '{name}' at {found} isn't part of hf-compress; uninstall the project that brought it, "
                "then reinstall hf-compress"
            )


hook.install()
