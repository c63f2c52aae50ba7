"""Tables of recovered models."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables.words import Figures, heading, interval


def recovered(found: Figures) -> Iterator[str]:
    """A pruned classifier, by the losses that recovered it."""
    yield f"Dense: accuracy {100 * found['dense_accuracy']:.2f} on the dev set; {found['steps']} steps for each row."
    yield ""
    yield from heading(
        "speed-up", "losses", "accuracy before", "accuracy, mean of seeds", "their deviation", "seeds", "on validation"
    )
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
    yield from heading(
        "way", "perplexity, mean of seeds", "their deviation", "seeds", "on the other corpus", "agreement with dense"
    )
    for row in found["rows"]:
        yield (
            f"| {row['way']} | {row['perplexity']:.2f} | {row['spread']:.2f} | {row['seeds']} "
            f"| {row['perplexity_elsewhere']:.1f} | {100 * row['agreement']:.1f} % |"
        )


def own_answers(found: Figures) -> Iterator[str]:
    """A decoder without some blocks, trained on two kinds of answers."""
    dense, answers = found["dense"], found["answers"]
    whole = answers["rewritten"] + sum(answers["kept"].values())
    kept = ", ".join(f"{count} kept for {reason}" for reason, count in answers["kept"].items())
    yield (
        f"{found['questions']} questions, {found['epochs']:g} epochs. Of {whole} answers {answers['rewritten']} were "
        f"rewritten{', ' if kept else ''}{kept}. Perplexity of the data's own answers: dense "
        f"{dense['perplexity']:.2f}, pruned {found['pruned']['perplexity']:.1f}; on the other text: dense "
        f"{dense['perplexity_elsewhere']:.1f}."
    )
    yield ""
    yield from heading(
        "trained", "perplexity", "deviation", "on the other text", "deviation", "kept of dense", "agreement", "seeds"
    )
    for row in found["rows"]:
        yield (
            f"| {row['way']} | {row['perplexity']:.2f} | {row['spread']:.2f} | {row['perplexity_elsewhere']:.1f} "
            f"| {row['spread_elsewhere']:.1f} "
            f"| {100 * dense['perplexity_elsewhere'] / row['perplexity_elsewhere']:.0f} % "
            f"| {100 * row['agreement']:.1f} % | {row['seeds']} |"
        )


def chunked(found: Figures) -> Iterator[str]:
    """Losses without logits."""
    yield f"{found['tokens']:,} tokens, {found['classes']:,} classes, width {found['width']}, float32, one thread."
    yield ""
    yield from heading(
        "loss", "head trained", "plain s", "in slices s", "of plain", "plain MiB", "in slices MiB", "of plain"
    )
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
    yield from heading(
        "by",
        "perplexity",
        "of online KL's",
        "KL to the dense model",
        "bytes a token",
        "of all logits in fp16",
        "s a step",
        "of labels'",
    )
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


def drafts(found: Figures) -> Iterator[str]:
    """Pruned models as drafts of their whole self."""
    dense, steps = found["dense"], f"{found['steps']} steps for each way, {found['ahead']} guesses a run"
    yield f"The whole: {dense['parameters'] / 1e6:.1f} M parameters, perplexity {dense['quality']['perplexity']:.2f}."
    yield f"{steps}; tokens/s in torch on one thread."
    yield ""
    yield from heading(
        "way", "parameters", "perplexity", "accepted", "tokens a run", "tokens/s alone", "tokens/s with it", "speed-up"
    )
    for row in found["drafts"]:
        speed = interval(row["speedup"]["value"], row["speedup"]["low"], row["speedup"]["high"], 2)
        yield (
            f"| {row['way']} | {row['parameters'] / 1e6:.1f} M | {row['perplexity']:.2f} "
            f"| {100 * row['acceptance']:.1f} % | {row['per_run']:.2f} "
            f"| {row['alone_tokens_per_second']:.1f} | {row['tokens_per_second']:.1f} | {speed} |"
        )
