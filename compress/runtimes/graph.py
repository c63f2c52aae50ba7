"""What is done to an ONNX graph after its export: dimensions get names, slow fusions go, equal weights become one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import onnx_ir as ir


def name_dimensions(graph: ir.Graph, dynamic: Mapping[str, Sequence[str]]) -> None:
    """Give open dimensions the names that users read, in place of torch's symbols.

    `dynamic` holds, by input, the names of its leading dimensions.
    """
    names: dict[str, str] = {}
    for value in graph.inputs:
        for size, name in zip(value.shape or (), dynamic.get(value.name or "", ()), strict=False):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names[size.value] = name
    made = [output for node in graph.all_nodes() for output in node.outputs]
    for value in (*graph.inputs, *made):
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else names.get(str(size.value), size) for size in value.shape]
            value.shape = ir.Shape(sizes)


def split_skip_norms(graph: ir.Graph) -> None:
    """Take each SkipLayerNormalization apart into its sum and its norm.

    The fused kernel of ONNX Runtime's CPU provider is the slow one: at 128 x 384 it takes 480 microseconds where the
    parts take 110 (version 1.31, one core of a Xeon with AVX-512), which is half of the time of a model pruned to a
    quarter. The sum is a `Sum`, as the runtime would fuse an `Add` with the norm again when it opens the file.
    """
    for node in [node for node in graph if node.op_type == "SkipLayerNormalization"]:
        states, skip, scale, shift, bias = [*node.inputs, None, None][:5]
        total = node.outputs[3] if len(node.outputs) > 3 else None
        tape = ir.tape.Tape()
        if bias is not None:
            states = tape.op("Add", [states, bias])
        summed = tape.op("Sum", [states, skip])
        epsilon = node.attributes.get_float("epsilon", 1e-12)
        normed = tape.op("LayerNormalization", [summed, scale, shift], {"axis": -1, "epsilon": epsilon})
        for old, new in ((node.outputs[0], normed), (total, summed)):
            if old is not None:
                new.shape, new.type, new.name = old.shape, old.type, old.name
                ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.insert_before(node, tape.nodes)
        graph.remove(node, safe=True)


def share_weights(graph: ir.Graph) -> None:
    """Keep one initializer of each value.

    Blocks that share matrices come out of the export with one each, but the fusions pack queries, keys and values, and
    fold transposes, into weights of every block's own. onnx_ir's pass for it refuses the transposes, as they lie.
    """
    kept: dict[tuple[ir.DataType, tuple[object, ...], bytes], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output():
            continue
        first = kept.setdefault((tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest()), value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del graph.initializers[name]
