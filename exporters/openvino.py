"""An OpenVINO graph, with open batch and sequence, checked against the model on shapes it never saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.errors import ExportError
from exporters.base import Quantizing
from exporters.compared import worst_error

if TYPE_CHECKING:
    from compress.state import State


class OpenVino(Quantizing):
    """openvino_model.xml with its weights beside it, config and tokenizer; decoders without a key-value cache.

    int8 and int4 are of weights alone, as nncf rounds them: by row, or in `group` inputs that share a scale. What can't
    be brought to int4 without much harm, tables and heads, it brings to int8. int8_accuracy is of activations too, and
    nncf gives operations back to float32, those that harm most first, until the score on the validation split is at
    most `max_drop` of the model's own below it, or as many were given back as it tries. `tolerance` is the largest
    error taken, relative to the largest magnitude of the output it is found in (or to 1).
    """

    kind: ClassVar[str] = "openvino"
    quantize: Literal["none", "int8", "int4", "int8_accuracy"] = "none"
    group: int | None = Field(default=None, ge=1, description="int4: inputs that share a scale; null: a row has one")
    max_drop: float = Field(default=0.01, gt=0, description="int8_accuracy: headline score worse by this share at most")
    samples: int = Field(default=128, ge=1, description="int8_accuracy: calibration texts")

    @model_validator(mode="after")
    def _fitting(self) -> OpenVino:
        kinds = {"group": "int4", "max_drop": "int8_accuracy", "samples": "int8_accuracy"}
        for name in sorted(self.model_fields_set & kinds.keys()):
            if self.quantize != kinds[name]:
                raise ValueError(f"'{name}' is for quantize: {kinds[name]}, met quantize: {self.quantize}")
        return self

    def write(self, state: State, folder: Path, card: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Export, round weights where asked, open in OpenVINO, and compare outputs on random inputs of other shapes."""
        from compress.runtimes import example_inputs
        from compress.runtimes.openvino import OpenVino as Runtime
        from compress.target import Target

        runtime = Runtime()
        if self.quantize != "none" and find_spec("nncf") is None:
            raise ExportError(
                f"openvino: {self.quantize} needs nncf; expected it here: pip install 'hf-compress[openvino]'"
            )
        runtime.build(state.model, example_inputs(state.model, state.tokenizer, 2, 16), folder)
        figures: dict[str, Any] = {}
        if self.quantize == "int8_accuracy":
            figures = self._controlled(state, folder)
        elif self.quantize != "none":
            _round(folder, self.quantize, self.group)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(folder)
        return worst_error(self.kind, state, runtime.open(folder, Target()), self.allowed), figures

    def _controlled(self, state: State, folder: Path) -> dict[str, Any]:
        """Bring the graph in a folder to int8 as far as the score allows; return the score before and after."""
        import nncf

        from compress.data.calibration import calibration
        from compress.evaluate import evaluate, headline
        from compress.evaluate.opened import Opened
        from compress.runtimes.openvino import OpenVinoSession

        def score(model: Any) -> float:
            scores = evaluate(model, state.data, state.task, split="validation", teacher=teacher)
            return headline(state.task, scores)[1].value

        def validate(compiled: Any, texts: Any) -> tuple[float, list[list[Any]]]:
            """The score, of which more is better, and the outputs by whose errors nncf ranks operations."""
            session = OpenVinoSession(compiled)
            met.append(score(Opened(session, state.model.config)))
            return sign * met[-1] / max(abs(before), 1e-12), [list(session(text).values()) for text in texts]

        def quantize(graph: Any) -> Any:
            names = [value.any_name for value in graph.inputs]
            texts = calibration(state.data, self.samples, batch_size=1)  # one by one there is no padding among them
            fed = nncf.Dataset([{name: text[name].numpy() for name in names} for text in texts])
            # An operation that is given back has its weights as they were, but what smoothing did before it stays.
            unsmoothed = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
            return nncf.quantize_with_accuracy_control(
                graph, fed, fed, validate, max_drop=self.max_drop, model_type=nncf.ModelType.TRANSFORMER,
                advanced_quantization_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=unsmoothed),
            )  # fmt: skip

        teacher = state.teacher
        sign, before, met = -1 if state.task.lower_is_better else 1, score(state.model), list[float]()
        _rewritten(folder, quantize)
        return {"score_before": before, "scores_tried": met}


def _round(folder: Path, kind: str, group: int | None) -> None:
    """Bring the weights of a graph to int8 or int4, in place."""
    import nncf

    modes = nncf.CompressWeightsMode
    asked = {"mode": modes.INT8_ASYM} if kind == "int8" else {"mode": modes.INT4_SYM, "group_size": group or -1}
    _rewritten(folder, lambda graph: nncf.compress_weights(graph, **asked))


def _rewritten(folder: Path, change: Callable[[Any], Any]) -> None:
    """Put what nncf makes of a graph in its place."""
    import openvino

    from compress.runtimes.openvino import FILE
    from compress.runtimes.tracing import quiet

    unfinished = folder / f"unfinished-{FILE}"
    with quiet():
        model = change(openvino.Core().read_model(str(folder / FILE)))
        openvino.save_model(model, str(unfinished), compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):  # the weights that were read lie in the file that is replaced
        unfinished.with_suffix(suffix).replace((folder / FILE).with_suffix(suffix))
