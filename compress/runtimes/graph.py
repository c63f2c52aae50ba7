"""What is done to an ONNX graph after its export: dimensions get names, slow fusions go, equal weights become one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

SPLIT = {  # fused norm: the norm it holds, and the number of that one's parameters
    "SkipLayerNormalization": ("LayerNormalization", 2),
    "SkipSimplifiedLayerNormalization": ("SimplifiedLayerNormalization", 1),
}


def name_dimensions(graph: ir.Graph, dynamic: Mapping[str, Sequence[str]]) -> None:
    """Give open dimensions the names that users read, in place of torch's symbols.

    `dynamic` holds, by input, the names of its leading dimensions.
    """
    names: dict[str, str] = {}
    for value in graph.inputs:
        for size, name in zip(value.shape or (), dynamic.get(value.name or "", ()), strict=False):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                names[size.value] = name

    def named(size: str) -> str:
        """A size, or a sum of sizes, with the names in it."""
        return re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), size)

    made = [output for node in graph.all_nodes() for output in node.outputs]
    for value in (*graph.inputs, *made):
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else named(str(size.value)) for size in value.shape])


def split_skip_norms(graph: ir.Graph) -> None:
    """Take each norm that is fused with the sum before it apart into the two.

    The fused kernels of ONNX Runtime's CPU provider are the slow ones (version 1.31, one core of a Xeon with AVX-512).
    SkipLayerNormalization takes 480 microseconds at 128 x 384 where the parts take 110, which is half of the time of a
    model pruned to a quarter; SkipSimplifiedLayerNormalization, of decoders, takes 165 at 128 x 576 where the parts
    take 83, and the same for one token. The sum is a `Sum`, as the runtime would fuse an `Add` with the norm again when
    it opens the file.
    """
    for node in [node for node in graph if node.op_type in SPLIT]:
        split, parameters = SPLIT[node.op_type]
        given = [*node.inputs, *[None] * 5]
        states, skip, bias = given[0], given[1], given[2 + parameters]
        total = node.outputs[3] if len(node.outputs) > 3 else None
        tape = ir.tape.Tape()
        if bias is not None:
            states = tape.op("Add", [states, bias])
        summed = tape.op("Sum", [states, skip])
        epsilon = node.attributes.get_float("epsilon", 1e-12)
        normed = tape.op(split, [summed, *given[2 : 2 + parameters]], {"axis": -1, "epsilon": epsilon})
        for old, new in ((node.outputs[0], normed), (total, summed)):
            if old is not None:
                new.shape, new.type, new.name = old.shape, old.type, old.name
                ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        graph.insert_before(node, tape.nodes)
        graph.remove(node, safe=True)


def fold_repeated(graph: ir.Graph) -> None:
    """Let what an emptied layer adds, a bias repeated for every token, cost as little as it can.

    It goes into the shift of the norm before, with the sum, where only this sum reads that norm, as in models with
    their norms after the residual sums. Elsewhere the sum itself repeats it.
    """
    for node in [node for node in graph if node.op_type in ("Add", "Sum") and len(node.inputs) == 2]:
        for place, value in enumerate(node.inputs):
            repeat, other = value.producer() if value else None, node.inputs[1 - place]
            bias = repeat.inputs[0] if repeat is not None and repeat.op_type == "Expand" else None
            if repeat is None or bias is None or bias.const_value is None or bias.const_value.shape.rank() != 1:
                continue
            if other is not None and _shifted(graph, other, bias, node.outputs[0]):
                graph.remove(node, safe=True)
            else:
                node.replace_input_with(place, bias)
            if not repeat.outputs[0].uses():
                graph.remove(repeat, safe=True)
            break


def _shifted(graph: ir.Graph, normed: ir.Value, bias: ir.Value, total: ir.Value) -> bool:
    """Add a bias to what a norm gives, in place of the sum of the two, if nothing else reads either; whether it is."""
    norm = normed.producer()
    shift = norm.inputs[2] if norm is not None and norm.op_type == "LayerNormalization" else None
    seen = len(normed.uses()) > 1 or normed.is_graph_output() or total.is_graph_output()
    if norm is None or shift is None or shift.const_value is None or bias.const_value is None or seen:
        return False
    moved = ir.tensor(shift.const_value.numpy() + bias.const_value.numpy(), name=f"{shift.name}.{bias.name}")
    both = ir.val(moved.name, const_value=moved)
    graph.register_initializer(both)
    norm.replace_input_with(2, both)
    ir.convenience.replace_all_uses_with(total, normed)
    return True


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
        content = np.ascontiguousarray(tensor.numpy()).view(np.uint8)  # no copy, of embeddings above all
        first = kept.setdefault((tensor.dtype, tuple(tensor.shape), hashlib.sha256(content.data).digest()), value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del graph.initializers[name]


def forget_weights(graph: ir.Graph) -> None:
    """Let go of a written graph's weights: onnxscript's rewriting rules hold on to the graph they last looked at.

    Where weights came in as inputs, the graph still counts those that fusions have replaced.
    """
    counted = getattr(graph.inputs, "_ref_counter", {})
    for value in (*graph.initializers.values(), *counted):
        value.const_value = None
