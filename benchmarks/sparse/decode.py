"""Tokens a second of a decoder with zeros, its layers packed as bitmaps where that pays, against itself dense.

    python -m benchmarks.sparse.decode --model MODEL --name smollm2 --source wikitext2/wiki.train.tokens
        --test wikitext2/wiki.test.tokens [--sparsities 0.5 0.7] [--runtimes torch onnxruntime] [--values float32]

`--model` is its folder. A request reads 64 tokens and writes 64, batch 1, one thread, with the key-value cache. Zeros
are chosen by magnitude, as speed doesn't ask which they are: what they cost is what benchmarks.sparse.oneshot tells. A
killed run goes on where it was.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness import options, record
from compress import compress

EXPORT = {"torch": "huggingface", "onnxruntime": "onnx"}


def plan(given: argparse.Namespace, runtime: str) -> dict[str, Any]:
    """The model with zeros, packed, for each sparsity and each way to keep the values."""
    passes: list[dict[str, Any]] = []
    for sparsity in given.sparsities:
        sparse = f"sparse-{sparsity:g}"
        zeros = {"method": "magnitude", "sparsity": sparsity, "samples": 4, "batch_size": 4}
        passes.append({"sparsify": zeros, "id": sparse, "after": []})
        for values in given.values:
            pack = {"format": "bitmap", "values": values}
            passes.append({"pack": pack, "id": f"{sparse}-{values}", "after": [sparse]})
    texts = {"source": str(given.data / given.source), "test": str(given.data / given.test)}
    return {
        "model": given.model,
        "task": "text-generation",
        "data": {**texts, "max_length": 256, "test_rows": 8},
        "target": {"runtime": runtime, "sequence": 64, "generate": 64, "threads": 1},
        "passes": passes,
        "export": [EXPORT[runtime]],
    }


def main() -> None:
    """Run a plan for each runtime and write results/sparse-decode-NAME.json."""
    parser = options(__doc__, "decode", language_model=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--runtimes", nargs="+", choices=list(EXPORT), default=list(EXPORT))
    parser.add_argument("--values", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    given = parser.parse_args()
    rows, dense = [], {}
    for runtime in given.runtimes:
        report = compress(plan=plan(given, runtime), out=given.out / runtime).report
        dense[runtime] = report["baseline"]["tokens_per_second"]
        for branch in report["branches"]:
            layers = branch["steps"][-1]["figures"]["layers"].values()
            rows.append(
                {
                    "runtime": runtime,
                    "sparsity": branch["steps"][0]["options"]["sparsity"],
                    "values": branch["steps"][-1]["options"]["values"],
                    "layers": len(layers),
                    "packed": sum(one["packed"] for one in layers),
                    "tokens_per_second": branch["tokens_per_second"],
                    "speedup": [branch[f"measured_{key}"] for key in ("speedup", "low", "high")],
                }
            )
    record(f"sparse-decode-{given.name}", {"dense": dense, "rows": rows})


if __name__ == "__main__":
    main()
