"""Tables of models with zeros, and of kernels that skip them."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables.words import Figures, heading, interval


def oneshot(found: Figures) -> Iterator[str]:
    """Zeros without recovery: ways by patterns."""
    dense = interval(*(found["dense"][name] for name in ("perplexity", "low", "high")), 2)
    yield f"Dense: perplexity {dense}. Calibration: {found['calibration_tokens']:,} tokens. No recovery."
    yield ""
    yield from heading("pattern", "method", "zeros", "perplexity", "of dense", "seconds")
    for row in found["rows"]:
        worse = row["perplexity"] / found["dense"]["perplexity"]
        yield (
            f"| {row['pattern']} | {row['method']} | {100 * row['share']:.1f} % "
            f"| {interval(row['perplexity'], row['low'], row['high'], 2)} | {worse:.2f}x | {row['seconds']:.0f} |"
        )


def sparse_encoder(found: Figures) -> Iterator[str]:
    """A classifier with more zeros from stage to stage: losses and patterns by sparsity."""
    dense = found["dense_accuracy"]
    yield f"Dense: accuracy {100 * dense:.2f} on the dev set; {found['steps']} steps of recovery at each stage."
    yield ""
    yield from heading("recovered by", "zeros", "accuracy", "points to dense")
    for row in found["rows"]:
        accuracy = interval(*(100 * value for value in (row["accuracy"], *row["interval"])), 2)
        yield f"| {row['way']} | {100 * row['zeros']:.1f} % | {accuracy} | {100 * (row['accuracy'] - dense):+.2f} |"


def kernels(found: Figures) -> Iterator[str]:
    """Products that skip zeros, by shapes and rows, and where they begin to pay."""
    peaks = found["peaks"]
    yield (
        f"One thread. Peaks of a core: {peaks['int8_gops']:.0f} int8 and {peaks['float32_gops']:.0f} float32 "
        f"giga-operations a second in registers, copies of {peaks['copy_gbs']:.1f} GB/s. "
        "[The roofline](results/sparse-kernels.svg)."
    )
    yield ""
    yield from heading(
        "kernel",
        "zeros",
        "inputs x outputs",
        "rows",
        "us, 10 to 90 %",
        "best dense",
        "its us",
        "ratio",
        "of the peak",
        "pays below density",
    )
    evens = {(row["kernel"], row["inputs"], row["outputs"], row["rows"]): row["density"] for row in found["break_even"]}
    for row in found["rows"]:
        if row["density"] != {"blocks": 0.1, "bitmap": 0.3, "bitmap16": 0.3}[row["kernel"]]:
            continue
        even = evens[row["kernel"], row["inputs"], row["outputs"], row["rows"]]
        peak = peaks["int8_gops" if row["kernel"] == "blocks" else "float32_gops"]
        reached = row["operations"] / row["microseconds"] / 1e3 / peak
        yield (
            f"| {row['kernel']} | {100 * (1 - row['density']):.0f} % | {row['inputs']} x {row['outputs']} "
            f"| {row['rows']} | {interval(row['microseconds'], row['low'], row['high'], 1)} | {row['rival']} "
            f"| {row['ratio'] * row['microseconds']:.1f} | {row['ratio']:.2f} | {100 * reached:.0f} % "
            f"| {'never' if even is None else f'{even:.2f}'} |"
        )


def packed(found: Figures) -> Iterator[str]:
    """Packed classifiers: milliseconds and times faster than the dense model by shape."""
    shapes = list(found["rows"][0]["timings"])
    yield "One thread; milliseconds of a call, and how many times faster than the dense model in float32."
    yield ""
    yield from heading("zeros in runs of four", "packed layers", "accuracy", *(f"{one} tokens" for one in shapes))
    for row in found["rows"]:
        told = []
        for timing in row["timings"].values():
            speed = interval(*(timing["speedup"][name] for name in ("value", "low", "high")), 2)
            told.append(f"{timing['milliseconds']:.2f} ms, {speed}")
        layers = f"{row['packed']} of {row['layers']}" if "packed" in row else "-"
        accuracy = f"{100 * row['accuracy']:.2f}" if "accuracy" in row else "-"
        yield f"| {row['model']} | {layers} | {accuracy} | " + " | ".join(told) + " |"


def decode(found: Figures) -> Iterator[str]:
    """A decoder's tokens a second, packed against dense."""
    told = ", ".join(f"{value:.1f} in {runtime}" for runtime, value in found["dense"].items())
    yield f"Dense, float32: tokens/s {told}."
    yield ""
    yield from heading("runtime", "zeros", "values kept in", "layers packed", "tokens/s", "of dense")
    for row in found["rows"]:
        yield (
            f"| {row['runtime']} | {100 * row['sparsity']:.0f} % | {row['values']} "
            f"| {row['packed']} of {row['layers']} | {row['tokens_per_second']:.1f} | {interval(*row['speedup'], 2)} |"
        )


def gpu_kernels(found: Figures) -> Iterator[str]:
    """Products on a GPU: each way beside cuBLAS, and how near it is to the time of fetching its bytes."""
    speed = found["abilities"]["copy_bytes_a_second"]
    rate = found["abilities"]["gemm_operations_a_second"]
    yield f"{found['card']}: copies of {speed / 1e12:.2f} TB/s, products of bfloat16 of {rate / 1e12:.0f} TFLOP/s."
    yield ""
    yield from heading(
        "way", "outputs x inputs", "density", "rows", "us", "of cuBLAS's speed", "of the bandwidth", "worst error"
    )
    places = ("outputs", "inputs", "rows")
    dense = {tuple(row[one] for one in places): row["milliseconds"] for row in found["rows"] if row["way"] == "dense"}
    for row in found["rows"]:
        took = row["milliseconds"]
        density = "-" if row["density"] is None else f"{row['density']:g}"
        yield (
            f"| {row['way']} | {row['outputs']} x {row['inputs']} | {density} | {row['rows']} | {1e3 * took:.1f} "
            f"| {dense[tuple(row[one] for one in places)] / took:.2f} "
            f"| {100 * row['bytes'] / (took / 1e3) / speed:.0f} % | {row['worst_error']:.1e} |"
        )


def gpu_decoders(found: Figures) -> Iterator[str]:
    """Whole decoders on a GPU, each way beside the dense one."""
    yield f"{found['card']}. Tokens a second over the whole batch; a step is a replayed graph, dense and packed alike."
    yield ""
    yield from heading("decoder", "batch", "way", "tokens/s", "of dense")
    dense = {(row["decoder"], row["batch"]): row["tokens_a_second"] for row in found["rows"] if row["way"] == "dense"}
    for row in found["rows"]:
        speed = row["tokens_a_second"]
        gain = speed / dense[row["decoder"], row["batch"]]
        yield f"| {row['decoder']} | {row['batch']} | {row['way']} | {speed:.1f} | {gain:.2f}x |"
