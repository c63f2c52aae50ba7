"""Lower precision for an ONNX graph: 16-bit weights, and int8 matrix products by ONNX Runtime's own quantization.

What runs in int8 are the products with constant matrices. Those of attention, whose both sides are computed, stay in
float32, and so do norms, softmax and sums. ONNX Runtime's tools know `MatMul` and no other, so other products with
constants are written as that first. Embedding tables, which those tools give one scale for the whole, which a few large
rows decide, get a scale for each row.

The tools infer the type of each value from shapes, and leave out, without a word, the products whose inputs they can't
tell the type of: fused operators are unknown to them. So the graph brings its types along, without the shapes, which
the fusions have made wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ExportError
from compress.runtimes.onnx import FILE
from compress.runtimes.tracing import quiet
from compress.target import machine

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHTS = f"{FILE}.data"
PERCENTILE = 99.99  # of the entries of a tensor that lie within its range, where that is chosen by percentile
DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")
Feed = Mapping[str, np.ndarray]


def sixteen_bits(folder: Path, kind: str) -> dict[str, Any]:
    """Store weights as ``FLOAT16`` or ``BFLOAT16``, in place; what runs is float32.

    ONNX Runtime's CPU provider computes neither, and folds the casts when it opens the file: half the bytes on disk,
    the same speed. Returns the number of tensors stored so.
    """
    import onnx_ir as ir

    from exporters.surgery import array_of, constant, is_large, put

    model, dtype = ir.load(folder / FILE), ir.DataType[kind]
    found = [value for value in model.graph.initializers.values() if is_large(value)]
    for value in found:
        with np.errstate(over="ignore"):  # told below
            narrow = array_of(value).astype(dtype.numpy())
        if not np.isfinite(narrow.astype(np.float32)).all():
            raise ExportError(f"onnx: '{value.name}' holds weights too large for {kind.lower()}; expected bf16")
        tape = ir.tape.Tape()
        wide = tape.op(
            "Cast", [constant(model.graph, f"{value.name}.{kind.lower()}", narrow)], {"to": ir.DataType.FLOAT}
        )
        put(model.graph, value, wide)
        model.graph.insert_before(model.graph[0], tape.nodes)
    save(model, folder)
    return {"weights": len(found)}


def dynamic_int8(folder: Path) -> dict[str, Any]:
    """Quantize in place: weights by column, activations by the range that each call meets."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def quantize(source: Path, goal: Path, products: Sequence[str], reduce: bool) -> None:
        quantize_dynamic(
            source, goal, op_types_to_quantize=["MatMul"], nodes_to_quantize=list(products), per_channel=True,
            reduce_range=reduce, weight_type=QuantType.QInt8, use_external_data_format=True,
        )  # fmt: skip

    return _int8(folder, quantize)


def static_int8(folder: Path, feeds: Sequence[Feed], ranges: str, form: str) -> dict[str, Any]:
    """Quantize in place: weights by column, activations by the ranges that `feeds` show.

    `ranges` are ``minmax``, ``percentile`` or ``entropy``, and `form` is ``qdq`` or ``qoperator``. In the first the
    sums come out in float32; the second rounds them to int8 once more.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    method = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}[ranges]
    written = {"qdq": QuantFormat.QDQ, "qoperator": QuantFormat.QOperator}[form]
    extra = {
        "CalibStridedMinMax": 1,  # one feed at a time; otherwise the activations of all are held at once
        "CalibPercentile": PERCENTILE,
        "OpTypesToExcludeOutputQuantization": ["MatMul"],
    }

    def quantize(source: Path, goal: Path, products: Sequence[str], reduce: bool) -> None:
        quantize_static(
            source, goal, _Feeds(feeds), quant_format=written, op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(products), per_channel=True, reduce_range=reduce,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, use_external_data_format=True,
            calibrate_method=CalibrationMethod[method], extra_options=extra,
        )  # fmt: skip

    return {"calibration_samples": len(feeds), **_int8(folder, quantize)}


class _Feeds:
    """Calibration inputs as ONNX Runtime asks for them: a range of them, one by one."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self.feeds = feeds
        self.set_range(0, len(feeds))

    def __len__(self) -> int:
        return len(self.feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Begin again with the feeds of a range."""
        self.left: Iterator[Feed] = iter(self.feeds[start_index:end_index])

    def get_next(self) -> Feed | None:
        """The next feed, None after the last."""
        return next(self.left, None)


def _int8(folder: Path, quantize: Callable[[Path, Path, Sequence[str], bool], None]) -> dict[str, Any]:
    """Ready the graph, quantize its products and tables, and tell how many there are; ExportError where none is.

    Where sums of two products overflow 16 bits, weights take 7 of their 8 bits.
    """
    import onnx
    import onnx_ir as ir

    from exporters.surgery import as_matmul, narrow_tables

    reduce = overflows()
    model = ir.load(folder / FILE)
    as_matmul(model.graph)
    tables = narrow_tables(model.graph)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"node_{index}"
    products = _products(model.graph)
    if not products:
        raise ExportError("onnx: the graph has no product with a constant matrix; expected some to run in int8")
    save(model, folder)
    plain = onnx.load(folder / FILE)
    for value in plain.graph.value_info:
        value.type.tensor_type.ClearField("shape")
    source, goal = folder / "typed", folder / "quantized"
    source.mkdir()
    goal.mkdir()
    with quiet():
        onnx.save(plain, source / FILE, save_as_external_data=True, location=WEIGHTS)
        quantize(source / FILE, goal / FILE, products, reduce)
    quantized = ir.load(goal / FILE)
    left = _products(quantized.graph)
    save(quantized, folder)
    for made in (source, goal):
        for path in made.iterdir():
            path.unlink()
        made.rmdir()
    return {
        "int8_products": len(products) - len(left),
        "int8_tables": tables,
        "weight_bits": 7 if reduce else 8,
        "skipped": dict.fromkeys(left, "ONNX Runtime's quantization left it in float32"),
    }


def overflows() -> bool:
    """Whether sums of two products of int8 overflow on this machine: on x86 without dot products."""
    return not any(flag in machine()["flags"] for flag in DOT_PRODUCTS) and "x86" in machine()["system"]


def _products(graph: ir.Graph) -> list[str]:
    """Names of the products with a constant float32 matrix."""
    from exporters.surgery import is_matrix

    return [str(node.name) for node in graph if node.op_type == "MatMul" and is_matrix(node.inputs[1])]


def save(model: ir.Model, folder: Path) -> None:
    """Write a graph in the place of the one that its weights were read from."""
    import onnx_ir as ir

    unfinished = folder / "unfinished"
    unfinished.mkdir()
    ir.save(model, unfinished / FILE, external_data=WEIGHTS)
    for name in (FILE, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    for path in list(unfinished.iterdir()):
        path.rename(folder / path.name)
    unfinished.rmdir()
