"""Auto: every runtime and precision that this machine has and the model takes, of which the fastest is to stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compress.verdict import Fastest
from exporters.base import Exporter
from exporters.huggingface import HuggingFace
from exporters.onnx import Onnx
from exporters.openvino import OpenVino

if TYPE_CHECKING:
    from compress.state import State

TRIED: tuple[Exporter, ...] = (
    Onnx(),
    Onnx(quantize="int8_dynamic"),
    Onnx(quantize="int8_static"),
    Onnx(quantize="weight_only"),
    OpenVino(),
    OpenVino(quantize="int8"),
    HuggingFace(),
)


class Auto(Fastest):
    """Write each of `TRIED`, judge it, time it on the target in its own runtime, and leave the fastest that is fit.

    What can't be written here, for a package that is missing or for what the model is, is told with the reason.
    """

    kind: ClassVar[str] = "auto"
    folder: ClassVar[str] = "auto"

    def candidates(self, state: State) -> tuple[Exporter, ...]:
        """All that need no fact that the model hasn't: `weight_only` is for what lies on a grid."""
        return tuple(one for one in TRIED if {fact.name for fact in one.requires} <= state.facts.keys())
