"""What a model does with what its norms give, seen in one call: which layers read it, and what else takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.statistics import frozen
from passes.watch import answer

LINEAR = nn.Linear | Conv1D


def uses_of(model: PreTrainedModel, norms: Iterable[str], batch: Mapping[str, Tensor]) -> tuple[Uses, list[Tensor]]:
    """Run a model on two rows of a batch; what becomes of what the named norms give, and the model's outputs."""
    uses = Uses(model)
    with ExitStack() as hooks, frozen(model):
        for norm in norms:
            hooks.callback(model.get_submodule(norm).register_forward_hook(uses.giving(norm)).remove)
        with uses:
            outputs = answer(model, {name: value[:2] for name, value in batch.items()})
    return uses, [leaf for leaf in pytree.tree_leaves(outputs.to_tuple()) if isinstance(leaf, Tensor)]


class Uses(TorchFunctionMode):
    """Notes, while a model is called, which weights read what its norms give, and which `others` take it, by norm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = {path: one for path, one in model.named_modules() if isinstance(one, LINEAR)}
        self.weights = {id(one.weight): f"{path}.weight" for path, one in layers.items()}
        self.readers: dict[str, str] = {}
        self.others: dict[str, str] = {}
        self.given: dict[int, tuple[str, Tensor]] = {}  # by storage; a tensor held is one whose place stays taken

    @property
    def norms(self) -> list[str]:
        """The norms in the order in which they gave something."""
        return [norm for norm, _ in self.given.values()]

    def giving(self, norm: str) -> Callable[..., None]:
        """A hook that notes what a norm gives."""

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.given[_place(output)] = norm, output

        return hook

    def norm_of(self, tensor: Tensor) -> str | None:
        """The norm that gave a tensor, or what it is a view of."""
        known = self.given.get(_place(tensor))
        return known[0] if known else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; where it makes something new of what a norm gave, look at what else it was handed."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and self.norm_of(result) is None:
            tensors = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            for norm in {name for one in tensors if (name := self.norm_of(one))}:
                weight = next((self.weights[id(one)] for one in tensors if id(one) in self.weights), None)
                if weight is None or self.readers.setdefault(weight, norm) != norm:
                    what = getattr(func, "__name__", str(func)).strip("_") if weight is None else f"{weight} again"
                    self.others.setdefault(norm, what)
        return result


def _place(tensor: Tensor) -> int:
    """Where the storage of a tensor lies."""
    return tensor.untyped_storage().data_ptr()
