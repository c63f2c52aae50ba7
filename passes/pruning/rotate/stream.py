"""Where the residual stream of a pre-norm model shows: its norms, the layers that read them, and all that writes to it.

Nothing of that is written down for the families. Which parameters have the width of the stream, `compress.uniform`
tells; which norm a layer reads is seen in one call of the model, by what each norm gives. The stream may be turned
where it is only added to and read through norms, so anything else that is met is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.errors import LayoutError
from compress.layout import Layout, record_of, stored_dim
from compress.statistics import frozen
from compress.uniform import HIDDEN, spans
from passes.pruning.depth.watch import answer

LINEAR = nn.Linear | Conv1D
EXPECTED = "expected a pre-norm model, whose stream is only added to, and read by linear layers through norms"


@dataclass(frozen=True)
class Stream:
    """The parameters along a residual stream, by name.

    `norms` are the modules in the order in which they run; `readers` the weights that read it, each with the norm
    between; `writers` all that adds to it, each with the stored dimension that lies along the stream. `centred` says
    that the norms take off the mean.
    """

    norms: tuple[str, ...]
    readers: Mapping[str, str]
    writers: Mapping[str, int]
    centred: bool


def stream_of(model: PreTrainedModel, layout: Layout, batch: Mapping[str, Tensor]) -> Stream:
    """Find the stream of a model, which is run on `batch` once; LayoutError where it can't be turned."""
    if folded := record_of(model.config).keys() & {"shared", "cured"}:
        raise LayoutError(f"slice_hidden: met {' and '.join(sorted(folded))} blocks; expected this step before fold")
    along = {
        name: dims
        for name, found in spans(model, layout).items()
        if (dims := [span.dim for span in found if span.name == HIDDEN])
    }
    weights = model.state_dict()
    norms = {name.removesuffix(".weight") for name in along if name.endswith(".weight") and weights[name].ndim == 1}
    uses = Uses(model)
    with ExitStack() as hooks, frozen(model):
        for norm in norms:
            hooks.callback(model.get_submodule(norm).register_forward_hook(uses.giving(norm)).remove)
        with uses:
            outputs = answer(model, {name: value[:2] for name, value in batch.items()})
    for norm, what in uses.others.items():
        raise LayoutError(f"slice_hidden: what '{norm}' gives goes into {what}; {EXPECTED}")
    if unread := sorted(norms - set(uses.readers.values())):
        raise LayoutError(f"slice_hidden: no linear layer reads '{unread[0]}'; {EXPECTED}")
    writers = dict[str, int]()
    for name, dims in along.items():
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        reads = isinstance(module, LINEAR) and weights[name].ndim == 2 and stored_dim(module, 1) in dims
        if len(dims) > 1 or (reads and name not in uses.readers):
            raise LayoutError(
                f"slice_hidden: '{name}' reads what no norm gave, or writes as much as it reads; {EXPECTED}"
            )
        if not reads and owner not in norms:
            writers[name] = dims[0]
    for leaf in pytree.tree_leaves(outputs.to_tuple()):
        if isinstance(leaf, Tensor) and (given := uses.norm_of(leaf)):
            raise LayoutError(f"slice_hidden: what '{given}' gives is an output of the model; expected one with a head")
    centred = all(isinstance(model.get_submodule(norm), nn.LayerNorm) for norm in norms)
    return Stream(tuple(uses.norms), uses.readers, writers, centred)


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
