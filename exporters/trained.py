"""Int8 products by scales that training chose: weights by their very codes, activations by the very ranges.

ONNX Runtime's own tools choose scales anew, from weights and from calibration, so that what runs would be another model
than the one that was trained. Here each product whose matrix lies on the grid is written with the grid's numbers. Those
on no grid, such as heads, stay in float32; tables are looked up in 8 bits by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ExportError
from compress.runtimes.onnx import FILE
from exporters.precision import overflows, save
from exporters.weight_only import Row, grid_columns

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel


def trained_int8(folder: Path, model: PreTrainedModel, grid: Mapping[str, Any]) -> dict[str, Any]:
    """Write the products of a graph with int8 weights and uint8 activations, in place, by the scales of `grid`.

    Where sums of two products would overflow 16 bits, codes of weights are stored from 0 to 255, as another kernel
    takes them: slower, and exact. Returns how many products there are, and which stay in float32, with the reason.
    """
    import onnx_ir as ir

    from exporters.surgery import array_of, as_matmul, forget_unused, is_matrix, narrow_tables

    program = ir.load(folder / FILE)
    as_matmul(program.graph)
    skipped, done, middle = dict[str, str](), 0, 128 if overflows() else 0
    columns_of = grid_columns(model, grid)
    for node in [node for node in program.graph if node.op_type == "MatMul"]:
        matrix = node.inputs[1]
        if matrix is None or not is_matrix(matrix):
            continue
        rows = columns_of(array_of(matrix))
        ranges = {row.input for row in rows or () if (row.codes != row.zero[0]).any()}
        if rows is None or len(ranges) != 1:
            skipped[str(matrix.name)] = "it is on no grid" if rows is None else "its rows read by unlike ranges"
            continue
        _put(program.graph, node, rows, ranges.pop(), middle)
        done += 1
    if not done and grid["layers"]:  # none is there where all were packed
        raise ExportError("onnx: the graph has no product with a matrix on the grid; expected some to run in int8")
    tables = narrow_tables(program.graph)
    forget_unused(program.graph)
    save(program, folder)
    return {"weight_bits": 8, "int8_products": done, "int8_tables": tables, "skipped": skipped}


def _put(graph: ir.Graph, node: ir.Node, rows: Sequence[Row], read: tuple[float, int] | None, middle: int) -> None:
    """Round both factors of a product to 8 bits; ONNX Runtime makes one operator of the four nodes."""
    import onnx_ir as ir

    from exporters.surgery import constant

    name = str(node.inputs[1].name if node.inputs[1] else "")
    if f"{name}.codes" not in graph.initializers:
        scale, zero = read or (1.0, 0)
        kind = np.uint8 if middle else np.int8
        codes = np.stack([row.codes.astype(np.int16) - int(row.zero[0]) + middle for row in rows], axis=1)
        constant(graph, f"{name}.codes", codes.astype(kind))
        constant(graph, f"{name}.scale", np.array([row.scale[0] for row in rows], np.float32))
        constant(graph, f"{name}.zero", np.full(len(rows), middle, kind))
        constant(graph, f"{name}.input_scale", np.array(scale, np.float32))
        constant(graph, f"{name}.input_zero", np.array(zero, np.uint8))
    held = [graph.initializers[f"{name}.{part}"] for part in ("codes", "scale", "zero")]
    step = [graph.initializers[f"{name}.{part}"] for part in ("input_scale", "input_zero")]
    tape, old = ir.tape.Tape(), node.outputs[0]
    near = tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [node.inputs[0], *step]), *step])
    result = tape.op("MatMul", [near, tape.op("DequantizeLinear", held, {"axis": 1})])
    result.shape, result.type, result.name = old.shape, old.type, old.name
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.insert_before(node, tape.nodes)
    graph.remove(node, safe=True)
