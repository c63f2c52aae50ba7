"""Smoothquant: hands the large channels of activations to the weights that read them, so that int8 takes both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compress.contract import MASKS, Fact, Part, Pass
from compress.data.calibration import BATCH, calibration

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from compress.state import State

SMALLEST = 1e-5  # magnitude below which a channel or a weight counts as that


class Smoothquant(Pass):
    """Divide what a norm gives by a scale for each channel, and multiply the weights that read it by the same.

    The model computes what it did. The scale of channel j is ``max|x_j|^strength / max|w_j|^(1 - strength)``, over
    calibration text and over all weights that read it (Xiao et al., "SmoothQuant", 2023, equation 4). A norm can give
    scales away where linear layers are all that reads it: in pre-norm models, not in BERT and its kin, where what a
    norm gives goes into the sum after the layer as well.
    """

    keeps: ClassVar[frozenset[Fact]] = frozenset({MASKS})
    touches: ClassVar[Part] = Part.VALUES

    strength: float = Field(default=0.5, ge=0, le=1, description="0: weights get smooth, 1: activations do")
    samples: int = Field(default=128, ge=1)
    batch_size: int = Field(default=BATCH, ge=1)

    def run(self, state: State) -> Iterator[State]:
        """Yield the state with scales moved; figures tell how far the channels of each norm lay apart before."""
        import torch

        from compress.layout import stored_dim

        batches = list(calibration(state.data, self.samples, self.batch_size))
        readers, skipped = readers_of(state.model, batches[0])
        ranges = ranges_of(state.model, [names[0] for names in readers.values()], batches)  # all of a norm read alike
        figures = {}
        for norm, names in readers.items():
            layers: list[Any] = [state.model.get_submodule(name) for name in names]
            columns = [layer.weight.detach().abs().amax(1 - stored_dim(layer, 1)) for layer in layers]
            given = ranges[names[0]]
            scale = scales(given, torch.stack(columns).amax(0), self.strength)
            hand_over_(state.model, norm, names, scale)
            figures[norm] = {"before": spread(given), "after": spread(given / scale)}
        state.figures = {"norms": len(readers), "outliers": figures, "skipped": skipped}
        yield state


def hand_over_(model: PreTrainedModel, norm: str, readers: Sequence[str], scale: Tensor) -> None:
    """Divide what a norm gives by `scale` (channels,) and multiply what its readers make of it, in place."""
    from torch import nn

    from compress.layout import stored_dim
    from passes.pruning.uniform.candidates import above_weight

    module: Any = model.get_submodule(norm)
    above = above_weight(module)
    module.weight = nn.Parameter((module.weight.detach() + above) / scale - above, module.weight.requires_grad)
    if getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(module.bias.detach() / scale, module.bias.requires_grad)
    for name in readers:
        layer: Any = model.get_submodule(name)
        wide = scale[None, :] if stored_dim(layer, 1) == 1 else scale[:, None]
        layer.weight = nn.Parameter(layer.weight.detach() * wide, layer.weight.requires_grad)


def scales(activations: Tensor, weights: Tensor, strength: float) -> Tensor:
    """What each channel is divided by (channels,), from the largest magnitudes of what it holds and what reads it."""
    import torch

    found = activations.clamp(min=SMALLEST) ** strength / weights.clamp(min=SMALLEST) ** (1 - strength)
    return torch.where(activations > 0, found, 1.0).to(weights.dtype)


def spread(ranges: Tensor) -> float:
    """How many times the largest channel is larger than the middle one."""
    return float(ranges.max() / ranges.median().clamp(min=SMALLEST))


def readers_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The linear layers that read each norm that nothing else reads, and why the other norms keep their scales.

    The model is run once, on two rows of the batch.
    """
    from passes.uses import uses_of

    shared: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    uses, outputs = uses_of(model, norms, batch)
    for output in outputs:
        if given := uses.norm_of(output):
            uses.others.setdefault(given, "the model's outputs")
    found: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for norm in norms:
        names = [weight.removesuffix(".weight") for weight, read in uses.readers.items() if read == norm]
        tied = [name for name in names if shared[id(model.get_submodule(name).weight)] > 1]
        if norm in uses.others:
            skipped[norm] = f"what it gives goes into {uses.others[norm]} as well"
        elif tied:
            skipped[norm] = f"the weight of '{tied[0]}' that reads it is used elsewhere"
        elif not names:
            skipped[norm] = "no linear layer reads what it gives"
        else:
            found[norm] = names
    return found, skipped


def ranges_of(
    model: PreTrainedModel, layers: Sequence[str], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Largest magnitude (channels,) of what each linear layer reads, over all tokens but padding."""
    from passes.watch import read_rows

    found: dict[str, Tensor] = {}

    def widen(name: str, rows: Tensor) -> None:
        if len(rows):
            largest = rows.abs().amax(0)
            found[name] = largest.maximum(found.get(name, largest))

    read_rows(model, layers, batches, widen)
    return found
