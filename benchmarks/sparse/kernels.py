"""Sparse kernels against the best dense products: `python -m benchmarks.sparse.kernels`.

Every shape, share of zeros and number of rows on one thread: int8 blocks and bitmaps through ONNX Runtime, beside its
float32 and dynamic int8 and torch's float32 and bfloat16. All that are compared run in turn in one process, once a
round in shuffled order, each after an untimed run of its own, so with what fits into caches at hand; ratios are of
medians, with the spread from the 10th to the 90th percentile. Then the shares of zeros at which a kernel begins to pay,
and what of the machine's peaks is reached. Takes about four minutes and an AVX-512 VNNI processor.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from benchmarks.harness import RESULTS, record
from benchmarks.sparse.roofline import picture
from compress.measure import interleave
from compress.sparse.formats import Bitmap, Blocks, Format, round_rows
from compress.sparse.library import onnx_library
from compress.sparse.modules import DOMAIN, NODES

SHAPES = ((768, 768), (768, 3072), (3072, 768), (384, 1536), (576, 1536))  # inputs, outputs
DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ROWS = (1, 4, 16, 32, 128)
RIVALS = {  # what each kernel is compared with: dense products of the same numbers
    "blocks": ("onnx_int8", "onnx_float32", "torch_float32", "torch_bfloat16"),
    "bitmap": ("onnx_float32", "torch_float32"),
    "bitmap16": ("torch_bfloat16", "onnx_float32", "torch_float32"),
}
Call = Callable[[], Any]


def weight_of(inputs: int, outputs: int, density: float, block: int) -> Tensor:
    """A random matrix (outputs, inputs) of which so much is not zero, in runs of `block`."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    kept = torch.rand(outputs, inputs // block, generator=generator) < density
    return torch.randn(outputs, inputs, generator=generator) * 0.05 * kept.repeat_interleave(block, 1)


def session(nodes: list[Any], held: dict[str, np.ndarray], inputs: int, outputs: int) -> onnxruntime.InferenceSession:
    """One layer in ONNX Runtime, on one thread."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
            for name, size in (("x", inputs), ("y", outputs))]  # fmt: skip
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], tensors)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return opened(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())


def opened(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.register_custom_ops_library(str(onnx_library()))
    return onnxruntime.InferenceSession(model, options)


def packed_session(packed: Format, kind: str) -> onnxruntime.InferenceSession:
    """A packed layer as our node."""
    held = {name: one.view(torch.int16).numpy() if one.dtype == torch.bfloat16 else one.numpy()
            for name, one in packed.tensors().items()}  # fmt: skip
    held["bias"] = np.zeros(packed.shape[0], np.float32)
    node = helper.make_node(NODES[kind].rpartition(":")[2], ["x", *held], ["y"], domain=DOMAIN)
    node.attribute.append(helper.make_attribute("inputs", packed.shape[1]))
    return session([node], held, packed.shape[1], packed.shape[0])


def dense_sessions(weight: Tensor, folder: Path) -> dict[str, onnxruntime.InferenceSession]:
    """ONNX Runtime's dense layers: float32, and int8 with dynamic ranges."""
    held = {"w": weight.T.contiguous().numpy(), "bias": np.zeros(len(weight), np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "bias"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
            for name, size in (("x", weight.shape[1]), ("y", len(weight)))]  # fmt: skip
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "f.onnx")
    quantize_dynamic(folder / "f.onnx", folder / "q.onnx", weight_type=QuantType.QInt8)  # the fastest of its kinds here
    return {"onnx_float32": opened(str(folder / "f.onnx")), "onnx_int8": opened(str(folder / "q.onnx"))}


def layers(inputs: int, outputs: int, folder: Path) -> tuple[dict[str, Any], dict[str, Format]]:
    """Every candidate of a shape by name, `KIND` or `KIND DENSITY`; and the packed matrices among them."""
    weight = weight_of(inputs, outputs, 1.0, 1)
    found: dict[str, Any] = dense_sessions(weight, folder)
    found |= {"torch_float32": weight, "torch_bfloat16": weight.bfloat16()}
    packed: dict[str, Format] = {}
    for density in DENSITIES:
        runs, single = weight_of(inputs, outputs, density, 4), weight_of(inputs, outputs, density, 1)
        packed[f"blocks {density}"] = Blocks.pack(*round_rows(runs))
        packed[f"bitmap {density}"] = Bitmap.pack(single)
        packed[f"bitmap16 {density}"] = Bitmap.pack(single.bfloat16())
    sessions = {name: packed_session(one, "blocks" if "blocks" in name else "bitmap") for name, one in packed.items()}
    return found | sessions, packed


def calls(candidates: dict[str, Any], inputs: int, rows: int) -> Iterator[tuple[str, Call]]:
    """Each candidate with its input."""
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows))
    feed, half = {"x": x.numpy()}, x.bfloat16()
    for name, one in candidates.items():
        if isinstance(one, Tensor):
            given = half if one.dtype == torch.bfloat16 else x
            yield name, lambda given=given, one=one: F.linear(given, one)
        else:
            yield name, lambda one=one: one.run(None, feed)


def measured(seconds: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Dense times, and a row for each kernel, shape, density and number of rows."""
    dense, rows_found = [], []
    for inputs, outputs in SHAPES:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            candidates, packed = layers(inputs, outputs, Path(folder))
            for rows in ROWS:
                named = dict(calls(candidates, inputs, rows))
                samples = interleave(list(named.values()), seconds=seconds, rounds=40)
                times = {name: summary(one) for name, one in zip(named, samples, strict=True)}
                where = {"inputs": inputs, "outputs": outputs, "rows": rows}
                dense.append({**where, **{name: times[name] for name in times if name not in packed}})
                for name, one in packed.items():
                    kind, density = name.split()
                    rival = min(RIVALS[kind], key=lambda other: times[other]["microseconds"])
                    rows_found.append({
                        **where, "kernel": kind, "density": float(density), **times[name], "bytes": one.bytes,
                        "rival": rival, "ratio": times[rival]["microseconds"] / times[name]["microseconds"],
                        "operations": 2 * rows * float(density) * inputs * outputs,
                    })  # fmt: skip
            print(f"{inputs} x {outputs} done", flush=True)
    return dense, rows_found


def summary(milliseconds: list[float]) -> dict[str, float]:
    """Median and spread in microseconds."""
    low, median, high = np.quantile(np.asarray(milliseconds) * 1e3, [0.1, 0.5, 0.9])
    return {"microseconds": float(median), "low": float(low), "high": float(high)}


def break_even(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each kernel, shape and number of rows the largest density at which it is as fast as dense products.

    Between two measured ones it lies where the line between their ratios crosses 1; null where none was reached, and
    the largest measured where the kernel won at all of them.
    """
    found = []
    for kind in RIVALS:
        for inputs, outputs in SHAPES:
            for count in ROWS:
                where = {"kernel": kind, "inputs": inputs, "outputs": outputs, "rows": count}
                line = [(row["density"], row["ratio"]) for row in rows if where.items() <= row.items()]
                found.append({**where, "density": crossing(line)})
    return found


def crossing(line: list[tuple[float, float]]) -> float | None:
    """Where ratios, which fall with density, pass 1."""
    best = None
    for (density, ratio), (later, lower) in zip(line, [*line[1:], (None, None)], strict=True):
        if ratio < 1:
            break
        best = density
        if later is not None and lower < 1:
            return density + (later - density) * (ratio - 1) / (ratio - lower)
    return best


def peaks() -> dict[str, float]:
    """What one core reaches: giga-operations a second in registers, and gigabytes a second of copying 256 MiB."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "peak")
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run(["g++", "-O2", "-std=c++17", str(source), "-o", str(program)], check=True)
        told = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.split()
    one, other = torch.ones(1 << 26), torch.empty(1 << 26)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        other.copy_(one)
        seconds.append(time.perf_counter() - start)
    return {"int8_gops": float(told[0]), "float32_gops": float(told[1]), "copy_gbs": 2 * 2**28 / min(seconds) / 1e9}


def main() -> None:
    """Measure, write the figures and draw the roofline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each shape and number of rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    reached = peaks()
    dense, rows = measured(given.seconds)
    figures = {"peaks": reached, "dense": dense, "rows": rows, "break_even": break_even(rows)}
    print(record("sparse-kernels", figures))
    (RESULTS / "sparse-kernels.svg").write_text(picture(rows, reached))


if __name__ == "__main__":
    main()
