"""Tables of pruned models, and of what pruning costs."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables.words import Figures, heading, interval


def demo(found: Figures) -> Iterator[str]:
    """The sentence encoder."""
    speed = interval(found["measured_speedup"], found["measured_low"], found["measured_high"], 2)
    yield from heading(
        "promised", "measured", "dense ms", "ms", "cosine before recovery", "cosine", "STS-B dense", "STS-B", "seconds"
    )
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
    yield from heading(
        "method", "promised", "measured", "at batch 32", "recovery steps", "accuracy before", "accuracy", "of dense"
    )
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
    yield from heading(
        "method",
        "parameters gone",
        "parameters",
        "perplexity before",
        "perplexity",
        "on the other corpus",
        "tokens/s, ONNX Runtime",
        "tokens/s, torch",
    )
    for row in [{**found["dense"], "method": "dense", "share": 0.0}, *found["branches"]]:
        before = f"{row['perplexity_before']:.1f}" if "perplexity_before" in row else "-"
        yield (
            f"| {row['method']} | {100 * row['share']:.0f} % | {row['parameters'] / 1e6:.1f} M | {before} "
            f"| {row['perplexity']:.1f} | {row['perplexity_elsewhere']:.1f} "
            f"| {row['tokens_per_second']:.1f} | {row['torch_tokens_per_second']:.1f} |"
        )


def cost(found: Figures) -> Iterator[str]:
    """What pruning and importing cost."""
    yield from heading("what", "figure")
    for what, figure in found.items():
        yield f"| {what} | {figure:.3g} |"
