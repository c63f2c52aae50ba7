"""ONNX Runtime: models written by transformers' ONNX exporter with the fusions that make the graph fast there.

Plain exports run at half the speed, so the graph is fused for the provider. The dynamic dimensions are named
explicitly: the export is then twice as fast, and inputs that share a dimension share it in the graph as well.

Packed layers are nodes of our own, for which a session is given our library. A folder has it beside the graph, for
programs without hf-compress; here the machine's own is taken, never one that lies in an artifact.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ExportError, TargetError
from compress.progress import say
from compress.runtimes import decoder
from compress.runtimes.base import Runtime, Session
from compress.runtimes.tracing import DYNAMIC, FAILURES, dynamic_shapes, quiet, uncached_config, widened
from compress.target import Target

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import Tensor, nn
    from transformers import PreTrainedModel

FILE = "model.onnx"
LIBRARY = "libhf_compress.so"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}


class OnnxSession(Session):
    """An ONNX file opened in ONNX Runtime."""

    def __init__(self, session: InferenceSession) -> None:
        self.session = session
        self.outputs = [output.name for output in session.get_outputs()]
        self.inputs = session.get_inputs()
        self.fixed = all(isinstance(size, int) for value in self.inputs for size in value.shape)

    @property
    def cached(self) -> bool:
        """Whether the graph takes and gives a key-value cache."""
        return any(value.name.startswith(decoder.PAST) for value in self.inputs)

    def feed(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """What the graph takes of inputs, as arrays; a text begins where no past is given."""
        if self.cached:
            inputs = {**decoder.without_past(self.inputs, inputs), **inputs}
        if lacking := [value.name for value in self.inputs if value.name not in inputs]:
            raise TargetError(f"onnx: input '{lacking[0]}' is not given; got {', '.join(inputs)}")
        return {value.name: np.asarray(inputs[value.name]) for value in self.inputs}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the graph; inputs that the export found unused are left out."""
        return dict(zip(self.outputs, self.session.run(None, self.feed(inputs)), strict=True))

    def example(self, batch: int, sequence: int) -> dict[str, np.ndarray]:
        """Ones for token ids and masks, zeros for token types, normal numbers for floats."""
        if self.cached:
            tokens = np.ones((batch, sequence), dtype=np.int64)
            return {"input_ids": tokens, "attention_mask": tokens}
        draw = np.random.default_rng(0)
        feed: dict[str, np.ndarray] = {}
        for value in self.inputs:
            open_sizes = [batch, *[sequence] * (len(value.shape) - 1)]
            shape = [
                size if isinstance(size, int) else free for size, free in zip(value.shape, open_sizes, strict=True)
            ]
            if value.type == "tensor(float)":
                feed[value.name] = draw.standard_normal(shape, dtype=np.float32)
            else:
                feed[value.name] = np.full(shape, "type" not in value.name, dtype=INTEGERS[value.type])
        return feed

    def generate(self, prompt: np.ndarray, count: int) -> np.ndarray:
        """Run the prompt, then one token after another with the cache."""
        if not self.cached:
            raise TargetError("onnx: the graph has no key-value cache to generate with; export it with cache: true")
        return decoder.generate(self.session, prompt, count)[0]


class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU or, with its GPU package, on CUDA."""

    name = "onnxruntime"
    package = "onnxruntime"

    def holds(self, path: Path) -> bool:
        """An .onnx file or a folder with model.onnx."""
        return (path / FILE).is_file() or (path.is_file() and path.suffix == ".onnx")

    def generates(self, path: Path) -> bool:
        """Whether the graph has a cache."""
        import onnx

        graph = onnx.load(path / FILE if path.is_dir() else path, load_external_data=False).graph
        return any(value.name.startswith(decoder.PAST) for value in graph.input)

    def build(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        folder: Path,
        dynamic: bool = True,
        cache: bool = False,
    ) -> Path:
        """Write model.onnx (weights in model.onnx.data) and the config.

        Where a model can't keep batch and sequence open under the names given, the dimensions that torch.export finds
        are tried, then the shape of `inputs` alone; what was lost is told. A graph with a cache keeps them open or is
        not written.
        """
        from transformers.exporters import OnnxConfig, OnnxExporter

        from compress.runtimes.graph import (
            fold_repeated,
            forget_weights,
            name_dimensions,
            share_weights,
            split_skip_norms,
        )
        from compress.sparse.library import onnx_library
        from compress.sparse.modules import as_nodes

        if model.device.type != "cpu" or model.training:  # both would show in the graph
            model = copy.deepcopy(model).eval()
            model.cpu()
        given: dict[str, Any] = widened(inputs) if dynamic or cache else dict(inputs)
        fixed = OnnxConfig(ort_fusions="cpu")
        if cache:
            given = decoder.midway(model, given)
            named = OnnxConfig(dynamic_shapes=decoder.open_dimensions(model, given), ort_fusions="cpu")
            configs = [named]
        else:
            named = OnnxConfig(dynamic_shapes=dynamic_shapes(model, given), ort_fusions="cpu")
            configs = [named, OnnxConfig(dynamic=True, ort_fusions="cpu"), fixed] if dynamic else [fixed]
        reasons = []
        for config in configs:
            try:
                plain = contextlib.nullcontext() if cache else uncached_config(model)
                with quiet(), plain, as_nodes(model) as has_nodes:
                    exported = OnnxExporter().export(model, dict(given), config=config)
                    graph = exported.program.graph
                    split_skip_norms(graph)
                    fold_repeated(graph)
                    share_weights(graph)
                    if config is named:
                        name_dimensions(graph, decoder.name_cache(graph) if cache else DYNAMIC)
                    exported.save_pretrained(folder)
                    forget_weights(graph)
                if has_nodes:
                    shutil.copyfile(onnx_library(), folder / LIBRARY)
            except FAILURES as error:
                reasons.append(
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
                )
                continue
            if config is fixed and dynamic:
                shapes = {name: tuple(value.shape) for name, value in given.items()}
                say(f"onnx: {type(model).__name__} takes only {shapes}, dimensions can't stay open: {reasons[0]}")
            return folder
        with_cache = " with its cache; expected cache: false" if cache else ""
        raise ExportError(f"onnx: {type(model).__name__} can't be exported{with_cache}: {reasons[-1]}")

    def build_module(self, module: nn.Module, inputs: Sequence[Tensor], path: Path) -> Path:
        """Write one module to a file, called with tensors by position, at the fixed shapes of `inputs`."""
        import onnx_ir
        import torch
        from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
        from transformers.exporters.utils import apply_patches

        from compress.runtimes.graph import fold_repeated, forget_weights, split_skip_norms

        path = path.with_suffix(".onnx")
        try:
            # The same patches as for a whole model, so that the part's graph is the one inside the whole.
            with quiet(), torch.no_grad(), apply_patches("dynamo"), apply_patches("onnx"):
                program = torch.onnx.export(module, tuple(inputs), dynamo=True, optimize=True, verbose=False)
                if program is None:
                    raise ExportError(f"onnx: {type(module).__name__} gave no graph")
                fuse_for_onnxruntime(program.model, "cpu")
                split_skip_norms(program.model.graph)
                fold_repeated(program.model.graph)
                onnx_ir.save(program.model, str(path), external_data=f"{path.name}.data")
                forget_weights(program.model.graph)
        except FAILURES as error:
            raise ExportError(f"onnx: {type(module).__name__} can't be exported: {error}") from error
        return path

    def open(self, path: Path, target: Target) -> OnnxSession:
        """Open with one pool of `target.threads` threads that doesn't spin: spinning pools slow one another."""
        self.require()
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as raised

        from compress.sparse.library import onnx_library

        provider = PROVIDERS[target.device]
        if provider not in (known := onnxruntime.get_available_providers()):
            raise TargetError(
                f"{path}: device '{target.device}' needs ONNX Runtime's {provider}, found {known}; "
                "expected it here: pip install 'hf-compress[cuda]'"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        file = path / FILE if path.is_dir() else path
        if has_our_nodes(file):
            options.register_custom_ops_library(str(onnx_library()))
        try:
            return OnnxSession(onnxruntime.InferenceSession(str(file), options, providers=[provider]))
        except (
            raised.Fail,
            raised.InvalidGraph,
            raised.InvalidProtobuf,
            raised.NoSuchFile,
            raised.NotImplemented,
            raised.RuntimeException,  # also what our own operators refuse
        ) as error:
            raise TargetError(f"{file}: ONNX Runtime can't open it: {error}") from error


def has_our_nodes(file: Path) -> bool:
    """Whether a graph has nodes that our library computes; a file that can't be read has none."""
    import onnx
    from google.protobuf.message import DecodeError

    from compress.sparse.modules import DOMAIN

    try:
        imports = onnx.load(file, load_external_data=False).opset_import
    except (OSError, DecodeError):
        return False
    return any(entry.domain == DOMAIN for entry in imports)
