"""Writes benchmarks/README.md from results/*.json: `python -m benchmarks.tables`. No figure is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import read

PAGE = Path(__file__).parent / "README.md"
Figures = Mapping[str, Any]


def interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """A value with its 95 % interval."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def demo(found: Figures) -> Iterator[str]:
    """The sentence encoder."""
    speed = interval(found["measured_speedup"], found["measured_low"], found["measured_high"], 2)
    yield "| promised | measured | dense ms | ms | cosine before recovery | cosine | STS-B dense | STS-B | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    stsb = [f"{100 * found[name]['value']:.2f}" if name in found else "not measured" for name in ("stsb_dense", "stsb")]
    yield (
        f"| {found['promised_speedup']:g}x | {speed} | {found['dense_milliseconds']:.2f} | {found['milliseconds']:.2f} "
        f"| {found['cosine_before_recovery']:.4f} | {interval(found['cosine'], *found['cosine_interval'], 4)} "
        f"| {stsb[0]} | {stsb[1]} | {found['seconds']:.0f} |"
    )


def encoder(found: Figures) -> Iterator[str]:
    """The classifier: methods by speed-ups."""
    dense = found["dense_accuracy"]
    yield f"Dense: accuracy {100 * dense:.2f} on the dev set, {found['dense_milliseconds']:.2f} ms at batch 1."
    yield ""
    yield "| method | promised | measured | at batch 32 | recovery steps | accuracy before | accuracy | of dense |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in found["branches"]:
        speed = interval(row["measured_speedup"], row["measured_low"], row["measured_high"], 2)
        yield (
            f"| {row['method']} | {row['promised_speedup'] or 0:g}x | {speed} | {row['batch_32']['value']:.2f} "
            f"| {row['recovery_steps']} | {100 * row['accuracy_before']:.2f} "
            f"| {interval(*(100 * value for value in (row['accuracy'], *row['accuracy_interval'])), 2)} "
            f"| {100 * row['accuracy'] / dense:.1f} % |"
        )


def decoder(found: Figures) -> Iterator[str]:
    """The language model: methods by share of parameters."""
    yield f"Recovery: {found['recovery_tokens']:,} tokens for each row."
    yield ""
    yield (
        "| method | parameters gone | parameters | perplexity before | perplexity | on the other corpus "
        "| tokens/s, ONNX Runtime | tokens/s, torch |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in [{**found["dense"], "method": "dense", "share": 0.0}, *found["branches"]]:
        before = f"{row['perplexity_before']:.1f}" if "perplexity_before" in row else "-"
        yield (
            f"| {row['method']} | {100 * row['share']:.0f} % | {row['parameters'] / 1e6:.1f} M | {before} "
            f"| {row['perplexity']:.1f} | {row['perplexity_elsewhere']:.1f} "
            f"| {row['tokens_per_second']:.1f} | {row['torch_tokens_per_second']:.1f} |"
        )


def drafts(found: Figures) -> Iterator[str]:
    """Pruned models as drafts of their whole self."""
    dense, steps = found["dense"], f"{found['steps']} steps for each way, {found['ahead']} guesses a run"
    yield f"The whole: {dense['parameters'] / 1e6:.1f} M parameters, perplexity {dense['quality']['perplexity']:.2f}."
    yield f"{steps}; tokens/s in torch on one thread."
    yield ""
    yield "| way | parameters | perplexity | accepted | tokens a run | tokens/s alone | tokens/s with it | speed-up |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in found["drafts"]:
        speed = interval(row["speedup"]["value"], row["speedup"]["low"], row["speedup"]["high"], 2)
        yield (
            f"| {row['way']} | {row['parameters'] / 1e6:.1f} M | {row['perplexity']:.2f} "
            f"| {100 * row['acceptance']:.1f} % | {row['per_run']:.2f} "
            f"| {row['alone_tokens_per_second']:.1f} | {row['tokens_per_second']:.1f} | {speed} |"
        )


def recovered(found: Figures) -> Iterator[str]:
    """A pruned classifier, by the losses that recovered it."""
    yield f"Dense: accuracy {100 * found['dense_accuracy']:.2f} on the dev set; {found['steps']} steps for each row."
    yield ""
    yield "| speed-up | losses | accuracy before | accuracy, mean of seeds | their deviation | seeds | on validation |"
    yield "|---|---|---|---|---|---|---|"
    for row in found["rows"]:
        yield (
            f"| {row['speedup']} | {row['losses']} | {100 * row['accuracy_before']:.2f} | {100 * row['accuracy']:.2f} "
            f"| {100 * row['spread']:.2f} | {row['seeds']} | {100 * row['validation_accuracy']:.2f} |"
        )


def shortened(found: Figures) -> Iterator[str]:
    """A decoder without some blocks, by the ways that recovered it."""
    dense, pruned = found["dense"], found["pruned"]
    yield (
        f"Perplexity: dense {dense['perplexity']:.2f}, without the blocks {pruned['perplexity']:.2f}, "
        f"on the other corpus {pruned['perplexity_elsewhere']:.1f}; then {found['steps']} steps for each row."
    )
    yield ""
    yield "| way | perplexity, mean of seeds | their deviation | seeds | on the other corpus | agreement with dense |"
    yield "|---|---|---|---|---|---|"
    for row in found["rows"]:
        yield (
            f"| {row['way']} | {row['perplexity']:.2f} | {row['spread']:.2f} | {row['seeds']} "
            f"| {row['perplexity_elsewhere']:.1f} | {100 * row['agreement']:.1f} % |"
        )


def chunked(found: Figures) -> Iterator[str]:
    """Losses without logits."""
    yield f"{found['tokens']:,} tokens, {found['classes']:,} classes, width {found['width']}, float32, one thread."
    yield ""
    yield "| loss | head trained | plain s | in slices s | of plain | plain MiB | in slices MiB | of plain |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in found["rows"]:
        plain, sliced = (row[f"{way}_bytes"] / 2**20 for way in ("plain", "sliced"))
        yield (
            f"| {row['loss']} | {'yes' if row['head_trained'] else 'no'} "
            f"| {row['plain_seconds']:.2f} | {row['sliced_seconds']:.2f} | {row['time_ratio']:.2f} "
            f"| {plain:.0f} | {sliced:.0f} | 1/{plain / sliced:.1f} |"
        )


def cached(found: Figures) -> Iterator[str]:
    """A recovery by what the teacher said once."""
    yield (
        f"Perplexity on held-out text: dense {found['dense']['test_perplexity']:.2f}, after blocks went "
        f"{found['pruned']['test_perplexity']:.2f}; then {found['tokens']:,} tokens of recovery for each row."
    )
    yield ""
    yield (
        "| by | perplexity | of online KL's | KL to the dense model | bytes a token | of all logits in fp16 "
        "| s a step | of labels' |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    labels, online = found["ways"][:2]
    for row in found["ways"]:
        stored = "- | -"
        if "bytes" in row:
            stored = f"{row['bytes_a_token']:.0f} | {100 * row['bytes'] / row['bytes_of_logits']:.2f} %"
        yield (
            f"| {row['way']} | {row['test_perplexity']:.3f} | {row['test_perplexity'] / online['test_perplexity']:.4f} "
            f"| {row['test_kl']:.4f} | {stored} "
            f"| {row['step_seconds']:.3f} | {row['step_seconds'] / labels['step_seconds']:.2f} |"
        )


def weights(found: Figures) -> Iterator[str]:
    """Few bits: methods by grids."""
    dense = found["dense"]
    yield (
        f"Dense: perplexity {dense['perplexity']:.2f}, {dense['bytes'] / 1e6:.1f} MB, "
        f"{dense['milliseconds']:.0f} ms a request of 64 tokens read and 64 written."
    )
    yield ""
    yield (
        "| method | bits | group | layer loss | perplexity | KL to dense | seconds | artifact MB | its perplexity "
        "| measured |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in found["branches"]:
        made = row["artifact"]
        speed = interval(made["measured_speedup"], made["measured_low"], made["measured_high"], 2)
        yield (
            f"| {row['method']} | {row['bits']} | {row['group']} | {row['layer_loss']:.5f} "
            f"| {interval(row['perplexity'], *row['perplexity_interval'], 2)} | {row['kl']:.4f} | {row['seconds']:.0f} "
            f"| {made['bytes'] / 1e6:.1f} | {made['perplexity']:.2f} | {speed} |"
        )


def artifacts(found: Figures) -> Iterator[str]:
    """An encoder in every precision."""
    yield "| weights | ranges | form | MB | ms | measured | STS-B Spearman | worst error |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in found["artifacts"]:
        speed = interval(row["measured_speedup"], row["measured_low"], row["measured_high"], 2)
        static = row.get("quantize") == "int8_static"
        quality = interval(*(100 * value for value in (row["spearman"], *row["spearman_interval"])), 2)
        yield (
            f"| {row.get('quantize', 'float32')} | {row.get('ranges', 'minmax') if static else '-'} "
            f"| {row.get('form', 'qdq') if static else '-'} | {row['bytes'] / 1e6:.1f} | {row['milliseconds']:.2f} "
            f"| {speed} | {quality} | {row['worst_error']:.2g} |"
        )


def exporters(found: Figures) -> Iterator[str]:
    """Every exporter on models of every kind; times compare within a runtime alone."""
    whole = {(row["model"], row["kind"]): row.get("milliseconds") for row in found["rows"] if row["quantize"] == "none"}
    yield "| model | exporter | weights | MB | speed of its runtime's float32 | worst error |"
    yield "|---|---|---|---|---|---|"
    for row in found["rows"]:
        told = f"| {row['model']} | {row['kind']} | {row['quantize'].replace('none', '-')} | "
        if "refused" in row:
            yield f"{told}refused: {' '.join(row['refused'].split())} | | |"
            continue
        beside = whole[row["model"], "huggingface" if row["kind"] == "compressed_tensors" else row["kind"]]
        speed = "not timed" if row["milliseconds"] is None else f"{beside / row['milliseconds']:.2f}x"
        yield f"{told}{row['bytes'] / 1e6:.1f} | {speed} | {row['worst_error']:.2g} |"


def oneshot(found: Figures) -> Iterator[str]:
    """Zeros without recovery: ways by patterns."""
    dense = interval(*(found["dense"][name] for name in ("perplexity", "low", "high")), 2)
    yield f"Dense: perplexity {dense}. Calibration: {found['calibration_tokens']:,} tokens. No recovery."
    yield ""
    yield "| pattern | method | zeros | perplexity | of dense | seconds |"
    yield "|---|---|---|---|---|---|"
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
    yield "| recovered by | zeros | accuracy | points to dense |"
    yield "|---|---|---|---|"
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
    yield (
        "| kernel | zeros | inputs x outputs | rows | us, 10 to 90 % | best dense | its us | ratio | of the peak "
        "| pays below density |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
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
    yield "| zeros in runs of four | packed layers | accuracy | " + " | ".join(f"{one} tokens" for one in shapes) + " |"
    yield "|---|---|---|" + "---|" * len(shapes)
    for row in found["rows"]:
        told = []
        for timing in row["timings"].values():
            speed = interval(*(timing["speedup"][name] for name in ("value", "low", "high")), 2)
            told.append(f"{timing['milliseconds']:.2f} ms, {speed}")
        layers = f"{row['packed']} of {row['layers']}" if "packed" in row else "-"
        accuracy = f"{100 * row['accuracy']:.2f}" if "accuracy" in row else "-"
        yield f"| {row['model']} | {layers} | {accuracy} | " + " | ".join(told) + " |"


def gpu_kernels(found: Figures) -> Iterator[str]:
    """Products on a GPU: each way beside cuBLAS, and how near it is to the time of fetching its bytes."""
    speed = found["abilities"]["copy_bytes_a_second"]
    rate = found["abilities"]["gemm_operations_a_second"]
    yield f"{found['card']}: copies of {speed / 1e12:.2f} TB/s, products of bfloat16 of {rate / 1e12:.0f} TFLOP/s."
    yield ""
    yield "| way | outputs x inputs | density | rows | us | of cuBLAS's speed | of the bandwidth | worst error |"
    yield "|---|---|---|---|---|---|---|---|"
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


def cost(found: Figures) -> Iterator[str]:
    """What pruning and importing cost."""
    yield "| what | figure |"
    yield "|---|---|"
    for what, figure in found.items():
        yield f"| {what} | {figure:.3g} |"


SUITES: dict[str, tuple[str, Callable[[Figures], Iterator[str]]]] = {
    "demo": ("The demo: MiniLM-L6 as a sentence encoder, label-free", demo),
    "demo-60-minutes": ("The same with an hour of recovery", demo),
    "structured-encoder": ("SST-2: MiniLM-L6 at many speeds, several ways to prune, equal recovery", encoder),
    "structured-decoder-smollm2": ("SmolLM2-135M with fewer parameters by several ways, equal recovery", decoder),
    "structured-decoder-stories15m": ("stories15M with fewer parameters by several ways, equal recovery", decoder),
    "recovery-encoder": ("SST-2: MiniLM-L6 pruned by `ziplm`, recovered by several losses", recovered),
    "recovery-decoder-stories15m": ("stories15M without a quarter of its blocks, by several losses", shortened),
    "recovery-decoder-smollm2": ("The same for SmolLM2-135M", shortened),
    "recovery-chunked": ("Losses of a large vocabulary without its logits: forward and backward pass", chunked),
    "recovery-cached-stories15m": ("stories15M without a block, recovered by what its teacher said once", cached),
    "recovery-cached-smollm2": ("The same for SmolLM2-135M", cached),
    "recovery-draft-stories15m": ("stories15M without blocks as the draft of its whole self", drafts),
    "quantization-weights": ("stories15M with the weights of its blocks in few bits: GPTQ against rounding", weights),
    "quantization-artifacts": ("MiniLM-L6 in ONNX Runtime by precision, each artifact judged by itself", artifacts),
    "quantization-exporters-stories15m": (
        "Every exporter on MiniLM-L6 pruned and folded, and stories15M pruned and in 4 bits, unrecovered",
        exporters,
    ),
    "quantization-exporters-smollm2": ("The same with SmolLM2-135M", exporters),
    "sparse-oneshot-stories15m": ("stories15M with half of its weights zero, by several ways, in one go", oneshot),
    "sparse-oneshot-smollm2": ("SmolLM2-135M with half of its weights zero, by several ways, in one go", oneshot),
    "sparse-encoder": ("SST-2: MiniLM-L6 made sparse in stages by oBERT", sparse_encoder),
    "sparse-kernels": ("Kernels that skip zeros against the best dense products", kernels),
    "sparse-packed": (
        "The same packed, in ONNX Runtime with our operators, against its dense float32 and int8",
        packed,
    ),
    "gpu-kernels": ("Kernels for NVIDIA GPUs, by shape, density and rows", gpu_kernels),
    "cost": ("Cost of statistics, database and search, and of starting up", cost),
    "cost-mpnet": ("The same for MPNet-base, 109 M parameters", cost),
    "cost-smollm2": ("The same for SmolLM2-135M", cost),
}


def page() -> str:
    """The whole page."""
    lines = ["# Figures", "", "Written by `python -m benchmarks.tables` from `benchmarks/results/*.json`.", ""]
    for name, (title, table) in SUITES.items():
        lines += [f"## {title}", ""]
        content = read(name)
        if content is None:
            lines += ["Not measured.", ""]
            continue
        machine, versions = content["machine"], content["versions"]
        lines += [*table(content["figures"]), "", f"`{content['command']}`; {machine['processor']}, "]
        lines[-1] += f"{machine['available_cores']} cores, {machine['memory_gib']} GiB; "
        lines[-1] += ", ".join(f"{package} {number}" for package, number in versions.items()) + "."
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
