"""The page of figures, made of results/*.json: `python -m benchmarks.tables` writes it. No figure is typed by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import read
from benchmarks.tables import compound, quantization, recovery, sparse, structured
from benchmarks.tables.words import Figures

PAGE = Path(__file__).parents[1] / "README.md"

SUITES: dict[str, tuple[str, Callable[[Figures], Iterator[str]]]] = {
    "demo": ("The demo: MiniLM-L6 as a sentence encoder, label-free", structured.demo),
    "demo-60-minutes": ("The same with an hour of recovery", structured.demo),
    "structured-encoder": (
        "SST-2: MiniLM-L6 at many speeds, several ways to prune, equal recovery",
        structured.encoder,
    ),
    "structured-decoder-smollm2-20": (
        "SmolLM2-135M without a fifth of its parameters by eight ways, equal recovery",
        structured.decoder,
    ),
    "structured-decoder-stories15m": (
        "stories15M with fewer parameters by several ways, equal recovery",
        structured.decoder,
    ),
    "compound-encoder": (
        "SST-2: MiniLM-L6 with everything at once, against dense float32 and its best precision",
        compound.compound,
    ),
    "recovery-encoder": ("SST-2: MiniLM-L6 pruned by `ziplm`, recovered by several losses", recovery.recovered),
    "recovery-decoder-stories15m": (
        "stories15M without a quarter of its blocks, by several losses",
        recovery.shortened,
    ),
    "recovery-decoder-smollm2": ("The same for SmolLM2-135M", recovery.shortened),
    "recovery-self-data-smollm2": (
        "SmolLM2-135M-Instruct without a quarter of its blocks, trained on GSM8K's answers or on its own",
        recovery.own_answers,
    ),
    "recovery-chunked": (
        "Losses of a large vocabulary without its logits: forward and backward pass",
        recovery.chunked,
    ),
    "recovery-cached-stories15m": (
        "stories15M without a block, recovered by what its teacher said once",
        recovery.cached,
    ),
    "recovery-cached-smollm2": ("The same for SmolLM2-135M", recovery.cached),
    "recovery-draft-stories15m": ("stories15M without blocks as the draft of its whole self", recovery.drafts),
    "quantization-weights": (
        "stories15M with the weights of its blocks in few bits: GPTQ against rounding",
        quantization.weights,
    ),
    "quantization-artifacts": (
        "MiniLM-L6 in ONNX Runtime by precision, each artifact judged by itself",
        quantization.artifacts,
    ),
    "quantization-binary": (
        "SST-2: MiniLM-L6 in one bit a weight, and few or one an activation",
        quantization.binary,
    ),
    "quantization-exporters-stories15m": (
        "Every exporter on MiniLM-L6 pruned and folded, and stories15M pruned and in 4 bits, unrecovered",
        quantization.exporters,
    ),
    "quantization-exporters-smollm2": ("The same with SmolLM2-135M", quantization.exporters),
    "sparse-oneshot-stories15m": (
        "stories15M with half of its weights zero, by several ways, in one go",
        sparse.oneshot,
    ),
    "sparse-oneshot-smollm2": (
        "SmolLM2-135M with half of its weights zero, by several ways, in one go",
        sparse.oneshot,
    ),
    "sparse-encoder": ("SST-2: MiniLM-L6 made sparse in stages by oBERT", sparse.sparse_encoder),
    "sparse-kernels": ("Kernels that skip zeros against the best dense products", sparse.kernels),
    "sparse-packed": (
        "The same packed, in ONNX Runtime with our operators, against its dense float32 and int8",
        sparse.packed,
    ),
    "sparse-decode-smollm2": (
        "SmolLM2-135M with zeros packed as bitmaps, writing with its cache",
        sparse.decode,
    ),
    "gpu-kernels": ("Kernels for NVIDIA GPUs, by shape, density and rows", sparse.gpu_kernels),
    "gpu-decoders": ("Whole decoders on an NVIDIA GPU, by format and batch", sparse.gpu_decoders),
    "cost": ("Cost of statistics, database and search, and of starting up", structured.cost),
    "cost-mpnet": ("The same for MPNet-base, 109 M parameters", structured.cost),
    "cost-smollm2": ("The same for SmolLM2-135M", structured.cost),
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
