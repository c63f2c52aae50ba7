"""Tokens a second of whole decoders on an NVIDIA GPU: dense, compiled, and packed in each format.

    python -m benchmarks.gpu.decoders [--decoders llama-1b llama-8b smollm2] [--batches 1 4 16] [--model FOLDER]

The Llama models have the shapes of those of 1B and 8B and random weights; SmolLM2 is read from `--model`. A step of one
token after a past of 256, with a static cache, is captured as a graph and replayed, packed and dense alike; each replay
goes one token further, as writing does. `compiled` is torch.compile of the dense model, captured the same. All matrices
of the blocks are packed: `bitmap` has the largest weights at the density given, `bsr` so many tiles of 64 by chance,
`semi_int4` the two largest of four.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, StaticCache

from benchmarks.gpu.kernels import KIND, require_gpu, tiled, two_of_four
from benchmarks.harness import record
from compress.errors import TargetError
from compress.replay import captured, elapsed
from compress.sparse.bsr import Bsr
from compress.sparse.formats import Bitmap
from compress.sparse.modules import SparseLinear, Stored
from compress.sparse.semi import SemiInt4

SHAPES: dict[str, dict[str, int]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
DENSITIES = (0.5, 0.3, 0.1)
TILES = 0.2  # the share of tiles that `bsr` keeps
PAST, ROUNDS = 256, 50


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--decoders", nargs="+", default=list(SHAPES), choices=[*SHAPES, "smollm2"])
    made.add_argument("--batches", nargs="+", default=[1, 4, 16], type=int)
    made.add_argument("--model", help="the folder of SmolLM2")
    asked = made.parse_args(arguments)
    if "smollm2" in asked.decoders and asked.model is None:
        made.error("smollm2 asked without --model; expected its folder")
    return asked


def decoder(name: str, folder: str | None) -> PreTrainedModel:
    """A decoder on the GPU."""
    if name == "smollm2":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=KIND).to("cuda").eval()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=4096)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=KIND).eval()


def formats() -> dict[str, Callable[[Tensor], Stored]]:
    """How a matrix is packed, by name."""
    by_density = {f"bitmap {density:g}": partial(kept, density=density) for density in DENSITIES}
    return {
        **by_density,
        f"bsr {TILES:g}": lambda weight: Bsr.pack(tiled(weight, TILES, 64), 64),
        "semi_int4": lambda weight: SemiInt4.pack(two_of_four(weight)),
    }


def kept(weight: Tensor, density: float) -> Bitmap:
    """A matrix with that share of its weights, the largest of each row."""
    count = max(1, round(density * weight.shape[1]))
    least = weight.abs().topk(count, dim=1).values[:, -1:]
    return Bitmap.pack(weight * (weight.abs() >= least))


def pack_blocks(model: PreTrainedModel, pack: Callable[[Tensor], Stored]) -> None:
    """Pack every linear layer but the head, in place."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(name, SparseLinear(pack(module.weight.detach()), module.bias).to(module.weight.device))


def step(model: nn.Module, config: Any, batch: int, device: str) -> Callable[[], Tensor]:
    """A call that gives the logits of one more token each time, after a past of `PAST`."""
    cache = StaticCache(config=config, max_cache_len=2 * PAST)
    ids = torch.arange(batch * PAST, device=device).view(batch, PAST) % config.vocab_size
    model(input_ids=ids, past_key_values=cache)
    token = ids[:, -1:].clone()
    return lambda: model(input_ids=token, past_key_values=cache).logits


def speed(model: nn.Module, config: Any, batch: int) -> float:
    """Tokens a second, over the whole batch."""
    with torch.inference_mode():
        replay = captured(step(model, config, batch, "cuda"))
        times = [elapsed([replay])[0] for _ in range(ROUNDS)]
    return batch / float(np.median(times)) * 1e3


def rows(name: str, folder: str | None, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Every way to run a decoder."""
    ways: dict[str, Callable[[Tensor], Stored] | None] = {"dense": None, "compiled": None, **formats()}
    for way, pack in ways.items():
        model = decoder(name, folder)
        if pack is not None:
            pack_blocks(model, pack)
        called = torch.compile(model) if way == "compiled" else model
        for batch in batches:
            yield {"decoder": name, "batch": batch, "way": way, "tokens_a_second": speed(called, model.config, batch)}
        del model, called
        torch.cuda.empty_cache()


def main() -> None:
    """Measure and record."""
    asked = parsed()
    try:
        card = require_gpu()
    except TargetError as error:
        raise SystemExit(f"gpu-decoders: {error}") from error
    figures: dict[str, Any] = {"card": card, "rows": []}
    for name in asked.decoders:
        for row in rows(name, asked.model, asked.batches):
            figures["rows"].append(row)
            print(row, flush=True)
    print(record("gpu-decoders", figures))


if __name__ == "__main__":
    main()
