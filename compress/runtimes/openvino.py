"""OpenVINO on Intel and ARM processors: models written by transformers' OpenVINO exporter, batch and sequence open.

Graphs have no key-value cache: a decoder reads whole texts here, and writes none.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ExportError, TargetError
from compress.runtimes.base import Runtime, Session
from compress.runtimes.tracing import FAILURES, dynamic_shapes, quiet, uncached_config, widened
from compress.target import Target

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

FILE = "openvino_model.xml"
KINDS = {"i64": np.int64, "i32": np.int32, "boolean": np.bool_}


class OpenVinoSession(Session):
    """A graph compiled by OpenVINO."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.inputs = {value.any_name: value for value in compiled.inputs}
        self.outputs = [value.any_name for value in compiled.outputs]
        self.fixed = all(value.partial_shape.is_static for value in compiled.inputs)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the graph; inputs that it has not are left out."""
        if lacking := [name for name in self.inputs if name not in inputs]:
            raise TargetError(f"openvino: input '{lacking[0]}' is not given; got {', '.join(inputs)}")
        found = self.compiled({name: np.asarray(inputs[name]) for name in self.inputs})
        return {name: np.array(found[name]) for name in self.outputs}  # the next run writes over its own

    def example(self, batch: int, sequence: int) -> dict[str, np.ndarray]:
        """Ones for token ids and masks, zeros for token types, normal numbers for floats."""
        draw, feed = np.random.default_rng(0), {}
        for name, value in self.inputs.items():
            sizes = [batch, *[sequence] * (len(value.partial_shape) - 1)]
            shape = [
                free if size.is_dynamic else size.get_length()
                for size, free in zip(value.partial_shape, sizes, strict=True)
            ]
            kind = KINDS.get(value.element_type.get_type_name())
            feed[name] = (
                draw.standard_normal(shape, dtype=np.float32)
                if kind is None
                else np.full(shape, "type" not in name, kind)
            )
        return feed

    def generate(self, prompt: np.ndarray, count: int) -> np.ndarray:
        """Refused, as there is no cache."""
        raise TargetError("openvino: the graph has no key-value cache to generate with; expected runtime: onnxruntime")


class OpenVino(Runtime):
    """OpenVINO on the CPU."""

    name = "openvino"
    package = "openvino"
    extra = "[openvino]"

    def require(self) -> None:
        """The same, and no usage data: OpenVINO and nncf send them if they find a package, and do well without."""
        super().require()
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

    def holds(self, path: Path) -> bool:
        """An .xml file or a folder with openvino_model.xml."""
        return (path / FILE).is_file() or (path.is_file() and path.suffix == ".xml")

    def generates(self, path: Path) -> bool:
        """No graph has a cache."""
        return False

    def build(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        folder: Path,
        dynamic: bool = True,
        cache: bool = False,
    ) -> Path:
        """Write openvino_model.xml, its weights beside it and the config."""
        self.require()
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        if cache:
            raise ExportError("openvino: graphs have no key-value cache here; expected runtime: onnxruntime, or torch")
        if model.device.type != "cpu" or model.training:  # both would show in the graph
            model = copy.deepcopy(model).eval()
            model.cpu()
        given: dict[str, Any] = widened(inputs) if dynamic else dict(inputs)
        config = OpenVINOConfig(dynamic_shapes=dynamic_shapes(model, given)) if dynamic else OpenVINOConfig()
        try:
            with quiet(), uncached_config(model):
                OpenVINOExporter().export(model, given, config=config).save_pretrained(folder)
        except FAILURES as error:
            raise ExportError(f"openvino: {type(model).__name__} can't be exported: {error}") from error
        return folder

    def build_module(self, module: nn.Module, inputs: Sequence[Tensor], path: Path) -> Path:
        """Write one module to a file, called with tensors by position, at the fixed shapes of `inputs`."""
        self.require()
        import openvino
        import torch

        path = path.with_suffix(".xml")
        try:
            with quiet(), torch.no_grad():
                program = openvino.convert_model(torch.export.export(module, tuple(inputs)))
                openvino.save_model(program, str(path), compress_to_fp16=False)
        except FAILURES as error:
            raise ExportError(f"openvino: {type(module).__name__} can't be exported: {error}") from error
        return path

    def open(self, path: Path, target: Target) -> OpenVinoSession:
        """Compile for `target.threads` threads, in float32 where the processor would rather have bfloat16."""
        self.require()
        import openvino

        if target.device != "cpu":
            raise TargetError(f"{path}: OpenVINO runs on the CPU here, device '{target.device}' asked; expected cpu")
        file = path / FILE if path.is_dir() else path
        told = {
            "INFERENCE_NUM_THREADS": target.threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            return OpenVinoSession(openvino.Core().compile_model(str(file), "CPU", told))
        except RuntimeError as error:
            raise TargetError(f"{file}: OpenVINO can't open it: {str(error).splitlines()[0]}") from error
