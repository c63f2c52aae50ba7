"""An OpenVINO graph, with open batch and sequence, checked against the model on shapes it never saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import ExportError
from exporters.base import Quantizing
from exporters.compared import worst_error

if TYPE_CHECKING:
    from compress.state import State


class OpenVino(Quantizing):
    """openvino_model.xml with its weights beside it, config and tokenizer; decoders without a key-value cache.

    int8 and int4 are of weights alone, as nncf rounds them: by row, or in `group` inputs that share a scale. What can't
    be brought to int4 without much harm, tables and heads, it brings to int8. `tolerance` is the largest error taken,
    relative to the largest magnitude of the output it is found in (or to 1).
    """

    kind: ClassVar[str] = "openvino"
    quantize: Literal["none", "int8", "int4"] = "none"
    group: int | None = Field(default=None, ge=1, description="int4: inputs that share a scale; null: a row has one")

    def write(self, state: State, folder: Path, card: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Export, round weights where asked, open in OpenVINO, and compare outputs on random inputs of other shapes."""
        from compress.runtimes import example_inputs
        from compress.runtimes.openvino import OpenVino as Runtime
        from compress.target import Target

        runtime = Runtime()
        runtime.build(state.model, example_inputs(state.model, state.tokenizer, 2, 16), folder)
        if self.quantize != "none":
            _round(folder, self.quantize, self.group)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(folder)
        return worst_error(self.kind, state, runtime.open(folder, Target()), self.allowed), {}


def _round(folder: Path, kind: str, group: int | None) -> None:
    """Bring the weights of a graph to int8 or int4, in place."""
    try:
        import nncf
    except ImportError as error:
        raise ExportError(
            f"openvino: {kind} needs nncf; expected it here: pip install 'hf-compress[openvino]'"
        ) from error
    import openvino

    from compress.runtimes.openvino import FILE
    from compress.runtimes.tracing import quiet

    modes = nncf.CompressWeightsMode
    asked = {"mode": modes.INT8_ASYM} if kind == "int8" else {"mode": modes.INT4_SYM, "group_size": group or -1}
    unfinished = folder / f"unfinished-{FILE}"
    with quiet():
        model = nncf.compress_weights(openvino.Core().read_model(str(folder / FILE)), **asked)
        openvino.save_model(model, str(unfinished), compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):  # the weights that were read lie in the file that is replaced
        unfinished.with_suffix(suffix).replace((folder / FILE).with_suffix(suffix))
