"""A GGUF file for llama.cpp and what builds on it: models of Llama's kind, with their tokenizer in the file.

Models whose blocks are alike are written under their own architecture and read back by transformers' GGUF loader. Where
heads or feed-forward columns differ from block to block the format has lists, which llama.cpp takes for the
architecture `deci`, and with it a block without attention; such a file is read back by the gguf package, each matrix
brought to its place by the rules told here. llama.cpp itself is not run.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from compress.errors import ExportError
from exporters.base import Quantizing
from exporters.compared import worst_error

if TYPE_CHECKING:
    from compress.state import State

FILE = "model.gguf"
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
LISTS = "DECI"  # the architecture whose sizes may differ from block to block
TURNED = ("LLAMA", "DECI")  # those whose rotary positions turn neighbours, not halves, of a head
NORMS = {"heads": "input_layernorm", "columns": "post_attention_layernorm"}


class Gguf(Quantizing):
    """model.gguf, config and tokenizer.

    f16, q8_0 and q4_0 are GGUF's own formats, to which matrices are rounded, in runs of 32 inputs; one whose inputs 32
    does not divide is kept in f16. `tolerance` is the largest error taken, relative to the largest magnitude of an
    output (or to 1).
    """

    kind: ClassVar[str] = "gguf"
    quantize: Literal["none", "f16", "q8_0", "q4_0"] = "none"
    pre: str = Field(default="default", description="llama.cpp's name for how text is split before BPE, e.g. smollm")

    def write(self, state: State, folder: Path, card: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Write the file, read it back, and compare outputs on random inputs of several shapes."""
        from compress.runtimes.torch import TorchSession
        from compress.target import Target

        if find_spec("gguf") is None:
            raise ExportError("gguf: needs the package gguf; expected it here: pip install 'hf-compress[gguf]'")
        if state.tokenizer is None:
            raise ExportError("gguf: the file holds the tokenizer, and this model has none")
        sizes = _sizes(state)
        alike = all(len(set(several)) == 1 for several in sizes.values())
        architecture = ARCHITECTURES[state.model.config.model_type] if alike else LISTS
        narrow = self._write(state.model, state.tokenizer, folder / FILE, architecture, sizes)
        loaded, figures = _read(state.model, state.tokenizer, folder, architecture, sizes)
        worst = worst_error(self.kind, state, TorchSession(loaded, Target()), self.allowed)
        state.model.config.save_pretrained(folder)  # not before, that nothing but the file is read
        state.tokenizer.save_pretrained(folder)
        return worst, {"architecture": architecture.lower(), "kept_in_f16": narrow, **figures}

    def _write(
        self, model: Any, tokenizer: Any, path: Path, architecture: str, sizes: Mapping[str, list[int]]
    ) -> list[str]:
        """Write sizes, tokens and tensors; the names of the matrices that could not be rounded as asked."""
        import gguf

        from exporters.vocabulary import write_vocabulary

        config = model.config
        kind = gguf.MODEL_ARCH[architecture]
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
        head, group = _head(config), config.num_attention_heads // config.num_key_value_heads
        alike = architecture != LISTS

        def told(values: list[int]) -> int | list[int]:
            return values[0] if alike else values

        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(len(sizes["heads"]))
        writer.add_feed_forward_length(told(sizes["columns"]))
        writer.add_head_count(told([group * heads for heads in sizes["heads"]]))
        writer.add_head_count_kv(told(sizes["heads"]))
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        write_vocabulary(writer, tokenizer, config.vocab_size, self.pre)
        asked = gguf.GGMLQuantizationType["F32" if self.quantize == "none" else self.quantize.upper()]
        narrow = []
        for name, (target, array) in _tensors(model, architecture, sizes).items():
            as_told = asked if array.ndim > 1 else gguf.GGMLQuantizationType.F32
            if array.ndim > 1 and self.quantize.startswith("q") and array.shape[1] % 32:
                narrow.append(name)
                as_told = gguf.GGMLQuantizationType.F16
            writer.add_tensor(target, gguf.quants.quantize(array, as_told), raw_dtype=as_told)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return narrow


def _sizes(state: State) -> dict[str, list[int]]:
    """Key-value heads and columns of each block; raises ExportError where the format can't tell the model."""
    from compress.record import record_of

    config, record = state.model.config, record_of(state.model.config)
    if config.model_type not in ARCHITECTURES:
        raise ExportError(f"gguf: met a {config.model_type}; expected one of {', '.join(ARCHITECTURES)}")
    (stack,) = state.layout.stacks.values()
    axes = [
        {axis.kind: axis.units for axis in state.layout.axes.values() if axis.block == f"{stack.module}.{index}"}
        for index in range(stack.length)
    ]
    sizes = {kind: [block[kind] for block in axes] for kind in ("heads", "columns")}
    odd = sorted({"linear", "shared", "cured", "stream", "binary", "sparse"} & record.keys())
    biased = any(name.endswith(".bias") for name, _ in state.model.named_parameters())
    rope, uneven = config.rope_parameters.get("rope_type", "default"), any(len(set(one)) > 1 for one in sizes.values())
    reasons = {
        f"its record tells of {', '.join(odd)}, for which the format has no word": bool(odd),
        f"its rotary positions are scaled ({rope})": rope != "default",
        f"its activation is {config.hidden_act}, not silu": config.hidden_act != "silu",
        "it slides a window over the text": bool(getattr(config, "use_sliding_window", False)),
        "a block has no feed-forward layer, which llama.cpp takes only without attention as well": 0
        in sizes["columns"],
        "it has biases, which transformers' loader leaves out": biased and config.model_type != "qwen2",
        f"the blocks of a {config.model_type} differ in size; lists of sizes are for Llama": uneven
        and config.model_type != "llama",
    }
    if met := [reason for reason, holds in reasons.items() if holds]:
        raise ExportError(f"gguf: the model can't be told: {'; '.join(met)}")
    return sizes


def _tensors(model: Any, architecture: str, sizes: Mapping[str, list[int]]) -> dict[str, tuple[str, np.ndarray]]:
    """By the model's name for it, each tensor with GGUF's name and its float32 values as llama.cpp wants them."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], len(sizes["heads"]))
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        kind = next((kind for kind, norm in NORMS.items() if f".{norm}." in name), None)
        if kind and not sizes[kind][int(name.split(".")[2])]:
            continue  # the norm of a layer that is gone
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(f"gguf: '{name}' has no place in architecture {architecture.lower()}")
        array = tensor.detach().float().cpu().numpy()
        found[name] = (
            target,
            np.ascontiguousarray(turned(array, _head(model.config)) if _turns(name, architecture) else array),
        )
    return found


def turned(array: np.ndarray, head: int, back: bool = False) -> np.ndarray:
    """Rows (heads * head, ...) with the halves of each head interleaved, as llama.cpp's rotation has them; or back."""
    halves = (head // 2, 2) if back else (2, head // 2)
    return array.reshape(-1, *halves, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _turns(name: str, architecture: str) -> bool:
    """Whether the rows of a tensor stand in another order in the file."""
    return architecture in TURNED and (".q_proj." in name or ".k_proj." in name)


def _head(config: Any) -> int:
    """How many places a head has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _read(
    model: Any, tokenizer: Any, folder: Path, architecture: str, sizes: Mapping[str, list[int]]
) -> tuple[Any, dict[str, Any]]:
    """The model that the file tells, and what is to be told of the reading."""
    if architecture == LISTS:
        return _by_package(model, folder / FILE, sizes), {"read_by": "gguf"}
    from transformers import AutoTokenizer

    from compress.runtimes.tracing import quiet
    from exporters.vocabulary import differing

    try:
        with quiet():
            loaded = type(model).from_pretrained(folder, gguf_file=FILE)
            found = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    except (RuntimeError, ValueError, KeyError) as error:
        why = "heads of its own width, perhaps, which it reads for Llama alone"
        raise ExportError(f"gguf: transformers can't read the file: {type(error).__name__}; {why}") from error
    told: dict[str, Any] = {"read_by": "transformers"}
    if wrong := differing(tokenizer, found):
        told["warnings"] = [f"read back, the tokenizer splits {text!r} otherwise; see the option pre" for text in wrong]
    return loaded, told


def _by_package(model: Any, path: Path, sizes: Mapping[str, list[int]]) -> Any:
    """A copy of the model with the values of the file."""
    import gguf
    import torch

    reader = gguf.GGUFReader(path)
    arrays = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    for kind, field in (("heads", "attention.head_count_kv"), ("columns", "feed_forward_length")):
        met = reader.get_field(f"{LISTS.lower()}.{field}")
        if met is None or met.contents() != sizes[kind]:
            raise ExportError(f"gguf: {field} reads back otherwise than it was; expected {sizes[kind]}")
    copied = copy.deepcopy(model)
    weights = copied.state_dict()
    for name, (target, _) in _tensors(model, LISTS, sizes).items():
        array = arrays.pop(target).reshape(weights[name].shape)
        array = turned(array, _head(model.config), back=True) if _turns(name, LISTS) else array
        weights[name] = torch.from_numpy(np.array(array, np.float32))
    if arrays:
        raise ExportError(f"gguf: '{min(arrays)}' is in the file and not in the model")
    copied.load_state_dict(weights)
    return copied
