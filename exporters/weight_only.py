"""Weight-only artifacts: each product whose matrix lies on a grid becomes a `MatMulNBits` that holds the grid's codes.

The fusions pack matrices and give them names of their own, so what a matrix was is told by its values: each of its
columns is a row of some layer, bit for bit, and brings that row's scales and zeros along. What the operator computes
with is therefore the very grid that was chosen, not another one near it. Activations are rounded to int8, as whole
numbers are what processors multiply fastest.

Products on no grid, such as heads, are rounded to 8 bits here, in runs of 32 weights, and tables to 8 bits by row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import ExportError
from compress.runtimes.onnx import FILE
from exporters.precision import save

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

SMALLEST = 16  # inputs in a block of the operator; blocks are powers of two
WHOLE_ROW = 128  # inputs in a block where a row has one scale, which is then told of each block
RUN = 32  # weights of a column that share a scale where a matrix is on no grid
INT8 = 4  # the operator's word for activations in int8


@dataclass(frozen=True)
class Row:
    """A row (in,) of a layer: its codes and, for each group of inputs, its scale and its zero.

    `input` is the scale and the zero of what the layer reads, where that is rounded as well.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group: int
    input: tuple[float, int] | None = None


def weight_only(folder: Path, model: PreTrainedModel, grid: Mapping[str, Any]) -> dict[str, Any]:
    """Store the products of a graph in 4 or 8 bits, in place, on the grid that `model` lies on.

    Returns how many there are, and which grids the operator can't hold, with the reason. Raises ExportError where no
    product lies on the grid.
    """
    import onnx_ir as ir

    from exporters.surgery import array_of, as_matmul, forget_unused, is_matrix, narrow_tables

    program = ir.load(folder / FILE)
    as_matmul(program.graph)
    skipped, done, rounded, columns_of = dict[str, str](), 0, 0, grid_columns(model, grid)
    for node in [node for node in program.graph if node.op_type == "MatMul"]:
        matrix = node.inputs[1]
        if matrix is None or not is_matrix(matrix):
            continue
        found = columns_of(array_of(matrix))
        if found is None:
            _put(program.graph, node, _rounded(array_of(matrix).T), RUN, 8)
            rounded += 1
        elif (block := _block(found[0].group, len(found[0].codes))) is None:
            skipped[str(matrix.name)] = f"{found[0].group} inputs share a scale; the operator takes 16, 32, 64, ..."
        else:
            _put(program.graph, node, found, block, 8 if grid["bits"] > 4 else 4)
            done += 1
    if not done and grid["layers"]:  # none is there where all were packed
        reasons = "; ".join(sorted(set(skipped.values()))) or "the graph holds other matrices than the model's blocks"
        raise ExportError(f"onnx: no product can be stored on the model's grid: {reasons}")
    tables = narrow_tables(program.graph)
    forget_unused(program.graph)
    program.graph.opset_imports["com.microsoft"] = 1
    save(program, folder)
    return {
        "weight_bits": grid["bits"],
        "weight_only_products": done,
        "int8_products": rounded,
        "int8_tables": tables,
        "skipped": skipped,
    }


def _rounded(columns: np.ndarray) -> list[Row]:
    """Columns (out, in) at the nearest of 255 values about 0, for each run of inputs."""
    blocks = -(-columns.shape[1] // RUN)
    runs = np.pad(columns, ((0, 0), (0, blocks * RUN - columns.shape[1]))).reshape(len(columns), blocks, RUN)
    scale = np.abs(runs).max(2)
    scale = np.where(scale > 0, scale / 127, 1).astype(np.float32)
    codes = (np.rint(runs / scale[:, :, None]) + 128).astype(np.uint8).reshape(len(columns), -1)
    zero = np.full(blocks, 128)
    return [Row(one[: columns.shape[1]], step, zero, RUN) for one, step in zip(codes, scale, strict=True)]


def grid_columns(model: PreTrainedModel, grid: Mapping[str, Any]) -> Callable[[np.ndarray], list[Row] | None]:
    """What tells, for the columns of a matrix (in, out), which rows of the layers on the grid they are.

    None where some column is none. Raises ExportError where a layer isn't on its grid.
    """
    rows = _rows(model, grid)

    def columns_of(matrix: np.ndarray) -> list[Row] | None:
        found = [rows.get(_digest(column)) for column in np.ascontiguousarray(matrix.T)]
        known = [row for row in found if row is not None]
        return known if len(known) == len(found) else None

    return columns_of


def _rows(model: PreTrainedModel, grid: Mapping[str, Any]) -> dict[bytes, Row]:
    """Every row of the layers on the grid, by the digest of its float32 values."""
    from transformers.pytorch_utils import Conv1D

    rows = {}
    for name in grid["layers"]:
        module: Any = model.get_submodule(name)
        weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().float().cpu().numpy()
        scale, zero = grid[f"{name}.scale"].numpy(), grid[f"{name}.zero"].numpy()
        group, read = grid["groups"][name], grid.get(f"{name}.input")
        step = None if read is None else (float(read[0]), int(read[1]))
        places = np.arange(weight.shape[1]) // group
        codes = np.rint(weight / scale[:, places]) + zero[:, places]
        told = (codes - zero[:, places]).astype(np.float32) * scale[:, places]
        if not np.array_equal(told, weight):
            raise ExportError(f"onnx: '{name}' doesn't lie on its grid; expected no change after that was chosen")
        for index, values in enumerate(np.ascontiguousarray(weight)):
            rows[_digest(values)] = Row(codes[index].astype(np.uint8), scale[index], zero[index], group, step)
    return rows


def _digest(values: np.ndarray) -> bytes:
    """A digest of float32 values; -0 counts as 0."""
    return hashlib.sha1((values + np.float32(0)).tobytes(), usedforsecurity=False).digest()


def _block(group: int, inputs: int) -> int | None:
    """Inputs in a block of the operator so that no block crosses groups; None where there is no such block."""
    largest = WHOLE_ROW if group >= inputs else group & -group
    return largest if largest >= SMALLEST else None


def _put(graph: ir.Graph, node: ir.Node, rows: list[Row], block: int, bits: int) -> None:
    """Put a `MatMulNBits` in the place of a product; the last block is filled up with zeros."""
    import onnx_ir as ir

    from exporters.surgery import constant

    inputs, (old, name) = len(rows[0].codes), (node.outputs[0], str(node.inputs[1].name if node.inputs[1] else ""))
    blocks = -(-inputs // block)
    places = np.arange(blocks) * block // rows[0].group
    zero = np.stack([row.zero[places] for row in rows]).astype(np.uint8)  # (out, blocks)
    codes = np.repeat(zero, block, axis=1)
    codes[:, :inputs] = np.stack([row.codes for row in rows])
    scale = np.stack([row.scale[places] for row in rows]).astype(np.float32)
    packed = _packed(codes, bits).reshape(len(rows), blocks, block * bits // 8)
    if f"{name}.codes" not in graph.initializers:
        constant(graph, f"{name}.codes", packed)
        constant(graph, f"{name}.scale", scale)
        constant(graph, f"{name}.zero", _packed(zero, bits))
    stored = [graph.initializers[f"{name}.{part}"] for part in ("codes", "scale", "zero")]
    sizes = {"K": inputs, "N": len(rows), "bits": bits, "block_size": block, "accuracy_level": INT8}
    tape = ir.tape.Tape()
    result = tape.op("MatMulNBits", [node.inputs[0], *stored], sizes, domain="com.microsoft")
    result.shape, result.type, result.name = old.shape, old.type, old.name
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.insert_before(node, tape.nodes)
    graph.remove(node, safe=True)


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (out, n) as bytes: of two 4-bit codes the first is the lower half; an odd row gets a zero at its end."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return even[:, 0::2] | even[:, 1::2] << 4
