"""An ONNX graph for ONNX Runtime, with open batch and sequence, checked against the model on shapes it never saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.contract import GRID, Fact
from compress.data.calibration import calibration
from compress.errors import ExportError
from exporters.base import Quantizing
from exporters.compared import error_of, worst_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.runtimes.onnx import OnnxRuntime, OnnxSession
    from compress.state import State

PROMPTS = ((1, 6), (3, 4))
TOKENS = 8  # generated from each prompt
ROUNDED = 0.05  # error taken of packed layers of int8, whose inputs fall to one code or the next by their last bit


class Onnx(Quantizing):
    """model.onnx with its weights beside it, config and tokenizer.

    `cache` lets a decoder take and give its key-value cache, so that a step runs one token; auto does so where the task
    is to generate text. `tolerance` is the largest error taken, relative to the largest magnitude of the output it is
    found in (or to 1); a quantized graph may differ by any finite one unless it is given, and is judged by its quality.
    Where training was on a grid with ranges of activations (`qat`), int8_static has these and those weights.
    Packed layers become nodes that `libhf_compress.so` beside the graph computes.
    """

    kind: ClassVar[str] = "onnx"
    quantize: Literal["none", "fp16", "bf16", "int8_dynamic", "int8_static", "weight_only"] = Field(
        default="none",
        description="fp16, bf16: weights alone; int8: products, by ranges met or calibrated; weight_only: gptq's codes",
    )
    ranges: Literal["minmax", "percentile", "entropy"] = Field(
        default="minmax", description="int8_static: how the ranges of activations are told from calibration"
    )
    form: Literal["qdq", "qoperator"] = Field(default="qdq", description="int8_static: how the graph is written")
    samples: int = Field(default=128, ge=1, description="int8_static: calibration texts")
    cache: Literal["auto"] | bool = "auto"

    @model_validator(mode="after")
    def _calibrated(self) -> Onnx:
        if self.quantize != "int8_static" and (said := self.model_fields_set & {"ranges", "form", "samples"}):
            raise ValueError(f"'{min(said)}' is for quantize: int8_static, met quantize: {self.quantize}")
        return self

    @property
    def requires(self) -> frozenset[Fact]:
        """What it must be told of a model besides the model."""
        return frozenset({GRID}) if self.quantize == "weight_only" else frozenset()

    def write(self, state: State, folder: Path, card: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Export, open in ONNX Runtime, and compare outputs on random inputs of other shapes, padding among them."""
        from compress.record import record_of
        from compress.runtimes import example_inputs
        from compress.runtimes.onnx import OnnxRuntime
        from compress.target import Target

        runtime = OnnxRuntime()
        runtime.require()
        cache = state.task.generates if self.cache == "auto" else self.cache
        runtime.build(state.model, example_inputs(state.model, state.tokenizer, 2, 16), folder, cache=cache)
        figures = self._quantized(state, folder, runtime)
        if state.tokenizer is not None:
            state.tokenizer.save_pretrained(folder)
        session = runtime.open(folder, Target())
        kinds = {told["format"] for told in record_of(state.model.config).get("sparse", {}).values()}
        allowed = max(self.allowed, ROUNDED) if "blocks" in kinds and self.tolerance is None else self.allowed
        worst = worst_error(self.kind, state, session, allowed)
        exact = session.cached and self.quantize == "none" and "blocks" not in kinds
        return max(worst, self._generated(state.model, session)) if exact else worst, figures

    def _quantized(self, state: State, folder: Path, runtime: OnnxRuntime) -> dict[str, Any]:
        """Bring the graph in a folder to the precision asked for; return what is to be told of it."""
        from compress.target import Target
        from exporters import precision
        from exporters.trained import trained_int8
        from exporters.weight_only import weight_only

        match self.quantize:
            case "fp16" | "bf16":
                return precision.sixteen_bits(folder, {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[self.quantize])
            case "int8_dynamic":
                return precision.dynamic_int8(folder)
            case "int8_static" if any(key.endswith(".input") for key in state.facts.get(GRID.name, {})):
                if said := self.model_fields_set & {"ranges", "form", "samples"}:
                    raise ExportError(f"onnx: activations have the ranges of qat's training; expected no '{min(said)}'")
                return trained_int8(folder, state.model, state.facts[GRID.name])
            case "int8_static":
                feed = runtime.open(folder, Target()).feed
                texts = calibration(state.data, self.samples, batch_size=1)  # one by one there is no padding among them
                return precision.static_int8(folder, [feed(text) for text in texts], self.ranges, self.form)
            case "weight_only":
                return weight_only(folder, state.model, state.facts[GRID.name])
        return {}

    def _generated(self, model: PreTrainedModel, session: OnnxSession) -> float:
        """Largest error of the logits in generation; raises ExportError where tokens or logits aren't the model's.

        Ours take a prompt and then single tokens with the cache; the model's come from transformers' `generate`.
        """
        import numpy as np
        import torch
        from transformers import GenerationConfig

        from compress.runtimes import decoder, example_inputs

        never = model.config.get_text_config().vocab_size  # no token ends a text
        asked = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=never, pad_token_id=0)
        asked.update(return_dict_in_generate=True, output_logits=True)
        worst, was_training = 0.0, model.training
        for seed, (batch, sequence) in enumerate(PROMPTS):
            prompt = example_inputs(model, None, batch, sequence, seed=seed)["input_ids"].to(model.device)
            with torch.inference_mode():
                mask = torch.ones_like(prompt)
                expected = model.eval().generate(prompt, attention_mask=mask, generation_config=asked)
            model.train(was_training)
            tokens, logits = decoder.generate(session.session, prompt.cpu().numpy(), TOKENS)
            error, allowed = error_of(torch.stack(expected.logits).cpu(), np.stack(logits), None, self.allowed)
            worst = max(worst, error)
            wrong = np.flatnonzero((tokens != expected.sequences[:, sequence:].cpu().numpy()).any(axis=0))
            if wrong.size or not error <= allowed:
                said = f"token {wrong[0] + 1} is another" if wrong.size else f"logits differ by {error:.3g}"
                raise ExportError(
                    f"onnx: generating {TOKENS} tokens from {batch} x {sequence}, {said}; expected the model's own, "
                    f"and logits that differ by at most {allowed:.3g}"
                )
        return worst
