"""Example inputs for any supported model, made from its config: token ids, images or audio features."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LENGTHS = ("max_position_embeddings", "n_positions", "max_target_positions")  # where configs keep the longest sequence


def example_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, batch: int, sequence: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs on the CPU that the model's `forward` takes, nothing masked; the same for the same arguments.

    `sequence` is shortened to what the model can take. A tokenizer adds those of its inputs that the model knows.
    """
    import torch

    config, draw = model.config, torch.Generator().manual_seed(seed)
    length = min(sequence, longest_sequence(model) or sequence)
    words = getattr(config.get_text_config(), "vocab_size", None) or 2

    def tokens() -> Tensor:
        return torch.randint(min(4, words - 1), words, (batch, length), generator=draw)

    def like_tokens(value: int) -> Tensor:
        return torch.full((batch, length), value, dtype=torch.long)

    if model.main_input_name == "pixel_values":
        height, width = _pair(config.image_size)
        return {"pixel_values": torch.randn(batch, config.num_channels, height, width, generator=draw)}
    if model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions  # two convolutions, the second of stride 2, halve the frames
        features = torch.randn(batch, config.num_mel_bins, frames, generator=draw)
        return {"input_features": features, "decoder_input_ids": tokens()}
    inputs = {"input_ids": tokens(), "attention_mask": like_tokens(1)}
    taken = inspect.signature(model.forward).parameters
    if tokenizer is not None and "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in taken:
        inputs["token_type_ids"] = like_tokens(0)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens()
    return inputs


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Most positions the model can take, where it has a limit.

    RoBERTa and its kin number positions from the padding index on and so have fewer than their config says.
    """
    from torch import nn

    config = model.config.get_text_config()
    limits = [limit for name in LENGTHS if isinstance(limit := getattr(config, name, None), int)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits) if limits else None


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """Height and width from a config that gives one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
