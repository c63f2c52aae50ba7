"""Changes to ONNX graphs that quantization needs: products in one form, tables looked up in int8."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

SMALL = 1024  # entries of a tensor that isn't worth storing otherwise


def as_matmul(graph: ir.Graph) -> None:
    """Write every product with a constant matrix as a `MatMul`, in place: `Gemm`, and those that hold a transpose."""
    for node in [node for node in graph if node.op_type in ("Gemm", "FusedMatMul")]:
        weight, told = node.inputs[1], {name: attribute.value for name, attribute in node.attributes.items()}
        plain = not told.get("transA") and told.get("alpha", 1.0) == 1.0 and told.get("beta", 1.0) == 1.0
        if weight is None or not is_matrix(weight) or not plain or told.get("transBatchA") or told.get("transBatchB"):
            continue
        if told.get("transB"):
            matrix = np.ascontiguousarray(array_of(weight).T)
            name = f"{weight.name}.transposed"
            weight = graph.initializers[name] if name in graph.initializers else constant(graph, name, matrix)
        tape = ir.tape.Tape()
        result = tape.op("MatMul", [node.inputs[0], weight])
        result.type = node.outputs[0].type
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            result = tape.op("Add", [result, node.inputs[2]])
        old = node.outputs[0]
        result.shape, result.type, result.name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
        graph.insert_before(node, tape.nodes)
        graph.remove(node, safe=True)
    forget_unused(graph)


def narrow_tables(graph: ir.Graph) -> int:
    """Store in int8, a scale for each row, the tables (rows, width) that are only looked up in; return their number."""
    tables = 0
    for value in list(graph.initializers.values()):
        uses = value.uses()
        looked_up = all(use.node.op_type == "Gather" and use.idx == 0 and not use.node.attributes.get_int("axis", 0)
                        for use in uses)  # fmt: skip
        if not uses or not looked_up or not is_matrix(value) or not is_large(value):
            continue
        rows = array_of(value)
        scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float32).tiny * 128) / 127
        codes = constant(graph, f"{value.name}.int8", np.rint(rows / scale).astype(np.int8))
        scales = constant(graph, f"{value.name}.scale", scale.astype(np.float32))
        for node, _ in list(uses):
            tape, ids, old = ir.tape.Tape(), node.inputs[1], node.outputs[0]
            wide = tape.op("Cast", [tape.op("Gather", [codes, ids])], {"to": ir.DataType.FLOAT})
            found = tape.op("Mul", [wide, tape.op("Gather", [scales, ids])])
            found.shape, found.type, found.name = old.shape, old.type, old.name
            ir.convenience.replace_all_uses_with(old, found, replace_graph_outputs=True)
            graph.insert_before(node, tape.nodes)
            graph.remove(node, safe=True)
        tables += 1
    forget_unused(graph)
    return tables


def is_matrix(value: ir.Value | None) -> bool:
    """Whether a value is a constant float32 matrix."""
    tensor = None if value is None else value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2


def is_large(value: ir.Value) -> bool:
    """Whether a constant is float32 and of a size that is worth a change."""
    tensor = value.const_value
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size >= SMALL


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer of the graph."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def put(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let all that read an initializer read another value, and drop the initializer."""
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)
    del graph.initializers[str(old.name)]


def forget_unused(graph: ir.Graph) -> None:
    """Drop the initializers that nothing reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def array_of(value: ir.Value) -> np.ndarray:
    """The entries of a constant."""
    if value.const_value is None:
        raise ValueError(f"'{value.name}' is no constant")
    return value.const_value.numpy()
