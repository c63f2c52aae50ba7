"""Lets plain `from_pretrained` load cut models, without importing transformers before it is wanted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"  # the module that holds transformers' registry of quantizers


def install() -> None:
    """Register the quantizer now where transformers is at work already, or as soon as its registry is imported."""
    if REGISTRY in sys.modules:
        register()
    elif not any(isinstance(finder, RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RegistryFinder())


def register() -> None:
    """Tell transformers who reads the record of cuts; doing so twice does no harm."""
    from compress import quantizer

    quantizer.register()


class RegistryFinder(MetaPathFinder):
    """Finds nothing itself; sees the registry being imported, steps aside and registers once it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, its loader made to register the quantizer afterwards."""
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
