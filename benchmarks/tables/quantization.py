"""Tables of models in few bits, and of artifacts."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables.words import Figures, heading, interval


def weights(found: Figures) -> Iterator[str]:
    """Few bits: methods by grids."""
    dense = found["dense"]
    yield (
        f"Dense: perplexity {dense['perplexity']:.2f}, {dense['bytes'] / 1e6:.1f} MB, "
        f"{dense['milliseconds']:.0f} ms a request of 64 tokens read and 64 written."
    )
    yield ""
    yield from heading(
        "method",
        "bits",
        "group",
        "layer loss",
        "perplexity",
        "KL to dense",
        "seconds",
        "artifact MB",
        "its perplexity",
        "measured",
    )
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
    yield from heading("weights", "ranges", "form", "MB", "ms", "measured", "STS-B Spearman", "worst error")
    for row in found["artifacts"]:
        speed = interval(row["measured_speedup"], row["measured_low"], row["measured_high"], 2)
        static = row.get("quantize") == "int8_static"
        quality = interval(*(100 * value for value in (row["spearman"], *row["spearman_interval"])), 2)
        yield (
            f"| {row.get('quantize', 'float32')} | {row.get('ranges', 'minmax') if static else '-'} "
            f"| {row.get('form', 'qdq') if static else '-'} | {row['bytes'] / 1e6:.1f} | {row['milliseconds']:.2f} "
            f"| {speed} | {quality} | {row['worst_error']:.2g} |"
        )


def binary(found: Figures) -> Iterator[str]:
    """An encoder in one bit a weight; sizes and operations as counted."""
    yield f"Dense: accuracy {100 * found['dense_accuracy']:.2f} on the dev set; {found['steps']} steps for each stage."
    yield ""
    yield from heading(
        "way", "accuracy", "of dense", "times smaller", "G float operations, of dense", "G bit operations", "minutes"
    )
    for row in found["rows"]:
        size, floats = row["stored_bytes"], row["float_operations"]
        yield (
            f"| {row['way']} | {interval(*(100 * value for value in (row['accuracy'], *row['interval'])), 2)} "
            f"| {100 * row['accuracy'] / found['dense_accuracy']:.1f} % | {size['before'] / size['after']:.1f} "
            f"| {floats['after'] / 1e9:.4f} of {floats['before'] / 1e9:.2f} | {row['bit_operations'] / 1e9:.2f} "
            f"| {row['seconds'] / 60:.0f} |"
        )


def exporters(found: Figures) -> Iterator[str]:
    """Every exporter on models of every kind; times compare within a runtime alone."""
    whole = {(row["model"], row["kind"]): row.get("milliseconds") for row in found["rows"] if row["quantize"] == "none"}
    yield from heading("model", "exporter", "weights", "MB", "speed of its runtime's float32", "worst error")
    for row in found["rows"]:
        told = f"| {row['model']} | {row['kind']} | {row['quantize'].replace('none', '-')} | "
        if "refused" in row:
            yield f"{told}refused: {' '.join(row['refused'].split())} | | |"
            continue
        beside = whole[row["model"], "huggingface" if row["kind"] == "compressed_tensors" else row["kind"]]
        speed = "not timed" if row["milliseconds"] is None else f"{beside / row['milliseconds']:.2f}x"
        yield f"{told}{row['bytes'] / 1e6:.1f} | {speed} | {row['worst_error']:.2g} |"
