"""Weights on grids of few bits, by GPTQ and by rounding, and an encoder's artifacts by precision, each judged.

A killed run goes on where it was. The decoder is stories15M, whose weights are true floats: those of SmolLM2 as it can
be had here lie on a 4-bit grid already, and would flatter any other. The encoder is MiniLM-L6 on STS-B, as it is.

    python -m benchmarks.quantization.suite --models models --data data
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import options, record
from compress import compress

GRIDS = ((4, 128), (4, 32), (3, 64))  # bits, and how many weights share a scale
METHODS = ("gptq", "rtn")
ENCODER = (  # exports of the encoder
    {},
    {"quantize": "fp16"},
    {"quantize": "bf16"},
    {"quantize": "int8_dynamic"},
    {"quantize": "int8_static", "ranges": "minmax"},
    {"quantize": "int8_static", "ranges": "percentile"},
    {"quantize": "int8_static", "ranges": "entropy"},
    {"quantize": "int8_static", "form": "qoperator"},
)


def decoder_plan(models: Path, data: Path) -> dict[str, Any]:
    """A branch for each grid and method, from the dense model."""
    return {
        "model": str(models / "stories15m"),
        "task": "text-generation",
        "data": {"source": str(data / "text" / "tinystories_sample.txt"), "max_length": 256},
        "target": {"runtime": "onnxruntime", "sequence": 64, "generate": 64},
        "passes": [
            {"gptq": {"bits": bits, "group": group, "method": method}, "id": f"{method}-{bits}-{group}", "after": []}
            for bits, group in GRIDS
            for method in METHODS
        ],
        "export": [{"onnx": {"quantize": "weight_only"}}],
    }


def encoder_plan(models: Path, data: Path) -> dict[str, Any]:
    """The encoder as it is, exported in every precision."""
    stsb = data / "stsb"
    return {
        "model": str(models / "minilm"),
        "task": "feature-extraction",
        "data": {
            "source": str(stsb / "train.tsv"),
            "text": ["sentence1", "sentence2"],
            "label": "score",
            "test": str(stsb / "dev.tsv"),
        },
        "target": {"runtime": "onnxruntime", "sequence": 128},
        "passes": ["calibrate"],
        "export": [{"onnx": options} for options in ENCODER],
    }


def weights(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each branch: the loss of its layers, its perplexity, and what its artifact is."""
    for branch in report["branches"]:
        (step,), (artifact,) = branch["steps"], branch["artifacts"]
        options = step["options"]
        yield {
            "method": options["method"],
            "bits": options["bits"],
            "group": options["group"],
            "layer_loss": step["figures"]["loss"],
            "perplexity": branch["quality"]["perplexity"],
            "perplexity_interval": branch["quality_interval"]["perplexity"],
            "kl": branch["quality"]["kl"],
            "seconds": step["seconds"],
            "artifact": told(artifact, "perplexity"),
        }


def told(artifact: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """An artifact's figures."""
    keys = ("bytes", "milliseconds", "measured_speedup", "measured_low", "measured_high", "worst_error")
    return {key: artifact[key] for key in keys} | {
        metric: artifact["quality"][metric],
        f"{metric}_interval": artifact["quality_interval"][metric],
    }


def main() -> None:
    """Run both plans and write results/quantization-weights.json and results/quantization-artifacts.json."""
    parser = options(__doc__, "quantization")
    parser.add_argument("--models", type=Path, required=True, help="a folder with stories15m and minilm in it")
    given = parser.parse_args()
    data = given.data
    report = compress(plan=decoder_plan(given.models, data), out=given.out / "decoder").report
    dense = report["baseline"]
    told_dense = {key: dense[key] for key in ("bytes", "milliseconds")} | {"perplexity": dense["quality"]["perplexity"]}
    record("quantization-weights", {"dense": told_dense, "branches": list(weights(report))})
    report = compress(plan=encoder_plan(given.models, data), out=given.out / "encoder").report
    (branch,) = report["branches"]
    rows = [
        {**options, **told(artifact, "spearman")}
        for options, artifact in zip(ENCODER, branch["artifacts"], strict=True)
    ]
    record("quantization-artifacts", {"artifacts": rows})


if __name__ == "__main__":
    main()
