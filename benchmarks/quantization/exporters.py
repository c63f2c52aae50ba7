"""Every exporter, in every precision, on models of four kinds: size, latency, worst error, or the reason of a refusal.

The models are MiniLM-L6 pruned to unlike widths and folded, and a decoder pruned and with its weights in 4 bits, all
unrecovered: this is about artifacts. Latency is that of one forward pass, of each runtime's artifacts in one process. A
killed run goes on where it was.

    python -m benchmarks.quantization.exporters --models models --data data [--decoder stories15m]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import options, record
from compress.errors import CompressError
from compress.measure import measure
from compress.plan import Plan, Tables
from compress.runner import Run, digest, prepare, remembered
from compress.runtimes import runtime_of
from compress.state import State
from exporters import EXPORTERS
from exporters.base import Exporter
from passes import PASSES

TRIED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("huggingface", {}),
    *(("onnx", {"quantize": kind}) for kind in ("none", "fp16", "bf16", "int8_dynamic", "int8_static", "weight_only")),
    *(("openvino", {"quantize": kind}) for kind in ("none", "int8", "int4")),
    ("compressed_tensors", {}),
    *(("gguf", {"quantize": kind}) for kind in ("none", "f16", "q8_0", "q4_0")),
)
CALIBRATION = {"samples": 64, "batch_size": 8}
SECONDS = 8.0


def plans(models: Path, data: Path, decoder: str) -> dict[str, dict[str, Any]]:
    """A plan for each model."""
    encoder: dict[str, Any] = {
        "model": str(models / "minilm"),
        "task": "feature-extraction",
        "data": {"source": str(data / "stsb" / "train.tsv"), "text": ["sentence1", "sentence2"], "label": "score"},
        "target": {"sequence": 128},
    }
    writer: dict[str, Any] = {
        "model": str(models / decoder),
        "task": "text-generation",
        "data": {"source": str(data / "text" / "tinystories_sample.txt"), "max_length": 128},
        "target": {"sequence": 128},
    }
    pruned: list[Any] = [{"calibrate": CALIBRATION}, {"ziplm": {"parameters": 0.7}}]
    folded = {"fold": {"group": 2, "groups": 2, "cure": 0, **CALIBRATION}}
    rounded = {"gptq": {"bits": 4, "group": 32, "symmetric": True, **CALIBRATION}}
    return {
        "MiniLM pruned": {**encoder, "passes": pruned},
        "MiniLM folded": {**encoder, "passes": [folded]},
        f"{decoder} pruned": {**writer, "passes": pruned},
        f"{decoder} quantized": {**writer, "passes": [rounded]},
    }


def exported(exporter: Exporter, state: State, folder: Path) -> dict[str, Any]:
    """An exporter's artifact, or why there is none."""
    if lacking := {fact.name for fact in exporter.requires} - state.facts.keys():
        return {"refused": f"needs the fact {min(lacking)}"}
    try:
        return asdict(exporter.run(state, folder))
    except CompressError as error:
        return {"refused": str(error)}


def timed(paths: Sequence[Path], state: State) -> dict[str, float]:
    """Milliseconds by path, each runtime's artifacts beside one another; none for what no runtime here opens."""
    groups = defaultdict(list)
    for path in paths:
        try:
            groups[runtime_of(path).name].append(path)
        except CompressError:
            continue  # a GGUF file is for a program that isn't here
    times: dict[str, float] = {}
    for group in groups.values():
        found = measure(group, state.target, seconds=SECONDS * len(group))
        times |= {str(path): timing.milliseconds for path, timing in zip(group, found, strict=True)}
    return times


def rows(name: str, plan: Mapping[str, Any], out: Path) -> list[dict[str, Any]]:
    """What came of each exporter for one model."""
    home = out / name.replace(" ", "-")
    run = Run(Plan.read({**plan, "export": []}, Tables(PASSES, EXPORTERS)), prepare(home, fresh=False))
    (leaf,) = run.go()
    state, made = run.state(leaf), []
    for kind, asked in TRIED:
        exporter: Any = EXPORTERS[kind](**asked)
        memory = run.cache / "exported" / f"{digest([run.key(leaf), kind, asked])}.json"
        artifact = remembered(memory, lambda one=exporter: exported(one, state, home / one.folder))
        made.append({"model": name, "kind": kind, "quantize": asked.get("quantize", "none"), **artifact})
        print(made[-1].get("refused", made[-1]["kind"]))
    paths = [Path(row["path"]) for row in made if "path" in row]
    times = remembered(run.cache / f"times-{digest([run.key(leaf), TRIED])}.json", lambda: timed(paths, state))
    kept = ("model", "kind", "quantize", "bytes", "worst_error", "refused")
    return [
        {key: row[key] for key in kept if key in row} | {"milliseconds": times.get(row.get("path", ""))} for row in made
    ]


def main() -> None:
    """Go through all and write results/quantization-exporters-DECODER.json."""
    parser = options(__doc__, "exporters")
    parser.add_argument("--models", type=Path, required=True, help="a folder with minilm and the decoder in it")
    parser.add_argument("--decoder", default="smollm2", help="its folder in there")
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name, plan in plans(given.models, given.data, given.decoder).items():
        found += rows(name, plan, given.out)
    record(f"quantization-exporters-{given.decoder}", {"rows": found})


if __name__ == "__main__":
    main()
