"""Similarity: how much of what the dense model's blocks tell each block left still tells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.evaluate.run import Run, inference
from compress.families import layout_of
from compress.layout import Layout
from compress.state import State, dense_name

TOKENS = 4096  # that are looked at; many more than a state is wide, or chance makes states alike


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment of features (rows, width) and (rows, other width); between 0 and 1.

    ``|Y'X|^2 / (|X'X| |Y'Y|)`` with columns centred, norms being Frobenius; blind to rotations and to scale. Not a
    number where one of them is constant. Kornblith et al., arXiv:1905.00414.
    """
    one, other = ((side.double() - side.double().mean(0)) for side in (one, other))
    both = (other.T @ one).square().sum()
    return float(both / ((one.T @ one).norm() * (other.T @ other).norm()))


def layer_similarity(state: State, split: str = "test") -> dict[str, float | None]:
    """For each block of the model, how alike its output on a split is to that of the dense model's block it was.

    Linear CKA over real tokens; None where it is undefined. A block that has no counterpart any more is left out.
    """
    teacher, size = state.teacher, 32
    pairs = [(state.model, state.layout), (teacher, layout_of(teacher))]
    found: list[dict[str, list[Tensor]]] = [{}, {}]
    run, tokens = Run(state.model, teacher, state.data, split, size), 0
    with inference(state.model), inference(teacher):
        for batch in state.data.batches(split, size, seed=0):
            real = batch["attention_mask"].bool()
            for (model, layout), states in zip(pairs, found, strict=True):
                with _watched(model, layout) as outputs:
                    run.forward(model, {name: part.to(model.device) for name, part in batch.items()})
                for name, output in outputs.items():
                    states.setdefault(name, []).append(output[real.to(output.device)].float().cpu())
            tokens += int(real.sum())
            if tokens >= TOKENS:
                break
    mine, theirs = ({name: torch.cat(parts)[:TOKENS] for name, parts in states.items()} for states in found)
    alike = {name: linear_cka(states, theirs[name]) for name, states in mine.items() if name in theirs}
    return {name: value if value == value else None for name, value in alike.items()}


@contextmanager
def _watched(model: PreTrainedModel, layout: Layout) -> Iterator[dict[str, Tensor]]:
    """Collect what each block gives, by the name it had before blocks were dropped, inside."""
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for stack in layout.stacks.values():
            for number in range(stack.length):
                name = f"{stack.module}.{number}"

                def keep(module: nn.Module, args: Any, output: Any, name: str = dense_name(name, model)) -> None:
                    found[name] = output[0] if isinstance(output, tuple) else output

                hooks.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        yield found
