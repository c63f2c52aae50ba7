"""Where the prunable widths of each model family lie: data, one short generator a family, from a model's config.

To add a family, write one function that yields its lists of blocks, and one line in `FAMILIES`; the laws in the tests
(cutting a unit equals silencing it, a saved model loads and computes the same) then hold for it or name the mistake.
Nothing here imports torch, so that a plan can be checked in no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compress.errors import LayoutError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compress.layout import Axis, Layout

Config = Any  # a transformers config; its `attribute_map` makes most names of entries alike
HEADS = "num_attention_heads"


@dataclass(frozen=True)
class Width:
    """A width inside one block, its modules named from the block.

    `rows` are (module, rows per unit) that write it, named again for each further run where several share a matrix;
    `reader` is the (module, columns per unit) that reads it; `bypass` the (module, further outputs) that goes with the
    last unit; `attributes` are (attribute of that module, value per unit); `entries` are those of `Axis`.
    """

    name: str
    units: int
    rows: tuple[tuple[str, int], ...]
    reader: tuple[str, int]
    bypass: tuple[str, int]
    attributes: tuple[tuple[str, int], ...] = ()
    entries: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Blocks:
    """One list of like blocks, its module named from the base model; `Stack` in layout.py tells of most fields.

    `shared` names the widths that must stay alike in all blocks, with the tables (modules named from the base model)
    that have one column for each unit.
    """

    module: str
    length: int
    widths: tuple[Width, ...]
    counts: tuple[tuple[str, str], ...] = (("", "num_hidden_layers"),)
    lists: tuple[str, ...] = ()
    anchored: int = 0
    caches: tuple[str, ...] = ()
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def heads(
    config: Config,
    module: str,
    inputs: Sequence[str],
    output: str,
    *,
    name: str = "heads",
    entry: str = HEADS,
    packed: int = 1,
    counts: Sequence[str] = (),
    widths: Sequence[str] = (),
    extra: int = 1,
) -> Width:
    """The heads of one attention; a unit is a key-value head with its query heads.

    `inputs` are the projections inside `module`, that of the queries first; `entry` is that of their number
    where the config has several; `packed` rows stand together for each place in a head; `counts` and `widths` are
    attributes of `module` with the number of heads and of places; `extra` is how many outputs it gives beside states.
    """
    count, groups = getattr(config, entry), None if entry != HEADS else getattr(config, "num_key_value_heads", None)
    units = groups or count
    places = getattr(config, "head_dim", None) or config.hidden_size // count
    group = count // units
    rows = [(f"{module}.{path}", places * packed * (group if index == 0 else 1)) for index, path in enumerate(inputs)]
    attributes = [(attribute, group) for attribute in counts] + [(attribute, places * group) for attribute in widths]
    entries = ((entry, group), *((("num_key_value_heads", 1),) if groups else ()))
    return Width(name, units, tuple(rows), (output, places * group), (module, extra), tuple(attributes), entries)


def columns(units: int, module: str, rows: Sequence[str], output: str, entry: str = "intermediate_size") -> Width:
    """The inner columns of one feed-forward layer, which goes as `module` with the last of them."""
    return Width("columns", units, tuple((path, 1) for path in rows), (output, 1), (module, 0), entries=((entry, 1),))


def full(length: int) -> tuple[str, ...]:
    """Caches of decoders whose blocks all see the whole past."""
    return ("full",) * length


def bert(config: Config) -> Iterator[Blocks]:
    """BERT and those that share its blocks: RoBERTa, XLM-RoBERTa, CamemBERT, Electra."""
    length, inputs, output = config.num_hidden_layers, ("query", "key", "value"), "attention.output.dense"
    attention = heads(config, "attention.self", inputs, output, counts=[HEADS], widths=["all_head_size"])
    feed = columns(config.intermediate_size, "intermediate", ["intermediate.dense"], "output.dense")
    yield Blocks("encoder.layer", length, (attention, feed), caches=full(length) if config.is_decoder else ())


def distilbert(config: Config) -> Iterator[Blocks]:
    """DistilBERT."""
    inputs, output = ("q_lin", "k_lin", "v_lin"), "attention.out_lin"
    attention = heads(config, "attention", inputs, output, counts=["n_heads"], widths=["dim"])
    feed = columns(config.hidden_dim, "ffn", ["ffn.lin1"], "ffn.lin2", "hidden_dim")
    yield Blocks("transformer.layer", config.num_hidden_layers, (attention, feed))


def mpnet(config: Config) -> Iterator[Blocks]:
    """MPNet: one table of relative positions holds a column for each head, in all layers."""
    inputs, output = ("q", "k", "v"), "attention.attn.o"
    attention = heads(config, "attention.attn", inputs, output, counts=[HEADS], widths=["all_head_size"])
    feed = columns(config.intermediate_size, "intermediate", ["intermediate.dense"], "output.dense")
    shared = {"heads": ("encoder.relative_attention_bias",)}
    yield Blocks("encoder.layer", config.num_hidden_layers, (attention, feed), shared=shared)


def llama(config: Config) -> Iterator[Blocks]:
    """Llama and those that share its blocks: SmolLM, Mistral, Qwen2, Qwen3, Gemma 3 (text)."""
    length = config.num_hidden_layers
    attention = heads(config, "self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj")
    feed = columns(config.intermediate_size, "mlp", ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj")
    caches = tuple(getattr(config, "layer_types", None) or full(length))
    yield Blocks("layers", length, (attention, feed), lists=("layer_types",), caches=caches)


def gpt2(config: Config) -> Iterator[Blocks]:
    """GPT-2: queries, keys and values are three runs of one matrix."""
    length, runs, widths = config.num_hidden_layers, ("c_attn", "c_attn", "c_attn"), ["embed_dim", "split_size"]
    attention = heads(config, "attn", runs, "attn.c_proj", counts=["num_heads"], widths=widths)
    feed = columns(config.n_inner or 4 * config.hidden_size, "mlp", ["mlp.c_fc"], "mlp.c_proj", "n_inner")
    anchored = length if config.scale_attn_by_inverse_layer_idx else 0  # the scale holds the number of the block
    yield Blocks("h", length, (attention, feed), anchored=anchored, caches=full(length))


def gpt_neox(config: Config) -> Iterator[Blocks]:
    """GPT-NeoX and Pythia: each head's query, key and value stand together in one matrix."""
    length = config.num_hidden_layers
    attention = heads(config, "attention", ("query_key_value",), "attention.dense", packed=3)
    feed = columns(config.intermediate_size, "mlp", ["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h")
    yield Blocks("layers", length, (attention, feed), caches=full(length))


def bart_heads(config: Config, module: str, name: str, entry: str) -> Width:
    """The attention that OPT and Whisper have from BART."""
    inputs, output, counts, widths = ("q_proj", "k_proj", "v_proj"), f"{module}.out_proj", ["num_heads"], ["embed_dim"]
    return heads(config, module, inputs, output, name=name, entry=entry, counts=counts, widths=widths)


def opt(config: Config) -> Iterator[Blocks]:
    """OPT: the block itself holds the feed-forward layer, so its first half goes and its second gives the constant."""
    length = config.num_hidden_layers
    attention = bart_heads(config, "self_attn", "heads", HEADS)
    feed = columns(config.ffn_dim, "fc1", ["fc1"], "fc2", "ffn_dim")
    yield Blocks("decoder.layers", length, (attention, feed), caches=full(length))


def vit(config: Config) -> Iterator[Blocks]:
    """ViT."""
    attention = heads(config, "attention", ("q_proj", "k_proj", "v_proj"), "attention.o_proj", counts=[HEADS])
    feed = columns(config.intermediate_size, "mlp", ["mlp.fc1"], "mlp.fc2")
    yield Blocks("layers", config.num_hidden_layers, (attention, feed))


def whisper(config: Config) -> Iterator[Blocks]:
    """Whisper: the decoder's blocks also attend to the encoder."""
    own = bart_heads(config, "self_attn", "heads", "encoder_attention_heads")
    feed = columns(config.encoder_ffn_dim, "fc1", ["fc1"], "fc2", "encoder_ffn_dim")
    yield Blocks("encoder.layers", config.encoder_layers, (own, feed), counts=(("", "encoder_layers"),))
    length, count = config.decoder_layers, "decoder_attention_heads"
    own = bart_heads(config, "self_attn", "heads", count)
    cross = bart_heads(config, "encoder_attn", "cross_heads", count)
    feed = columns(config.decoder_ffn_dim, "fc1", ["fc1"], "fc2", "decoder_ffn_dim")
    counts = (("", "decoder_layers"),)
    yield Blocks("decoder.layers", length, (own, cross, feed), counts=counts, caches=full(length))


def t5(config: Config) -> Iterator[Blocks]:
    """T5: the first block's table of relative positions serves the heads of all blocks.

    Across attention, the first block's zeros stand for the table, so those heads stay alike as well. By the entry
    `decoder_layers` transformers sizes the cache; without it, by the encoder.
    """

    def attention(module: str, name: str) -> Width:
        inputs, output, counts, widths = ("q", "k", "v"), f"{module}.o", ["n_heads"], ["inner_dim"]
        return heads(config, module, inputs, output, name=name, extra=2, counts=counts, widths=widths)

    def feed(module: str) -> Width:
        inputs = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)
        return columns(config.d_ff, module, [f"{module}.{name}" for name in inputs], f"{module}.wo", "d_ff")

    own = attention("layer.0.SelfAttention", "heads")
    table = "block.0.layer.0.SelfAttention.relative_attention_bias"
    widths, shared = (own, feed("layer.1.DenseReluDense")), {"heads": (f"encoder.{table}",)}
    counts = (("", "num_layers"), ("encoder", "num_layers"))
    yield Blocks("encoder.block", config.num_layers, widths, counts=counts, anchored=1, shared=shared)
    cross = attention("layer.1.EncDecAttention", "cross_heads")
    decoder, across = (own, cross, feed("layer.2.DenseReluDense")), {"heads": (f"decoder.{table}",), "cross_heads": ()}
    lengths = (("", "num_decoder_layers"), ("", "decoder_layers"), ("decoder", "num_layers"))
    yield Blocks("decoder.block", config.num_decoder_layers, decoder, counts=lengths, anchored=1, shared=across)


FAMILIES: dict[str, Callable[[Config], Iterator[Blocks]]] = {
    "bert": bert,
    "roberta": bert,
    "xlm-roberta": bert,
    "camembert": bert,
    "electra": bert,
    "distilbert": distilbert,
    "mpnet": mpnet,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "gemma3_text": llama,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "opt": opt,
    "vit": vit,
    "whisper": whisper,
    "t5": t5,
}


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a transformers model at its present sizes; LayoutError for a model of no known family."""
    from compress.record import prefix_of, record_of

    layout, prefix = dense_layout(model), prefix_of(model)
    present = {}
    for name, units in record_of(model.config)["sizes"].items():
        present[prefix + name] = replace(layout.axis(prefix + name), units=units)
    return replace(layout, axes={**layout.axes, **present})


def dense_layout(model: PreTrainedModel) -> Layout:
    """The layout that a model of this config has before any cut."""
    from compress.layout import Layout, Stack
    from compress.record import prefix_of

    kind = model.config.model_type
    if kind not in FAMILIES:
        raise LayoutError(
            f"no family for models of type '{kind}'{nearest(kind, FAMILIES)}; known: {', '.join(FAMILIES)}"
        )
    prefix = prefix_of(model)
    modules = {name for name, _ in model.named_modules()}
    axes, stacks = [], {}
    for blocks in FAMILIES[kind](model.config):
        path = prefix + blocks.module
        if path not in modules:  # a task may use the encoder or the decoder alone
            continue
        counts = tuple((prefix + owner if owner else "", entry) for owner, entry in blocks.counts)
        stack = stacks[path] = Stack(path, blocks.length, counts, blocks.lists, blocks.anchored, blocks.caches)
        for width in blocks.widths:
            placed = [_place(width, f"{path}.{index}") for index in range(blocks.length)]
            if width.name in blocks.shared:
                tables = [prefix + table for table in blocks.shared[width.name]]
                axes.append(_join(placed, f"{path.rpartition('.')[0]}.{width.name}", tables))
            else:
                axes += [replace(axis, least=int(axis.name in stack.leaders)) for axis in placed]
    return Layout({axis.name: axis for axis in axes}, stacks)


def _place(width: Width, block: str) -> Axis:
    """The axis of a width in one block."""
    from compress.layout import Axis, Site

    sites, ends = [], dict[str, int]()
    for path, rows in width.rows:
        sites.append(Site(f"{block}.{path}", 0, rows, ends.get(path, 0)))
        ends[path] = ends.get(path, 0) + rows
    sites.append(Site(f"{block}.{width.reader[0]}", 1, width.reader[1]))
    module = f"{block}.{width.bypass[0]}"
    attributes = tuple((module, name, per_unit) for name, per_unit in width.attributes)
    kind = "columns" if width.name == "columns" else "heads"
    bypass = ((module, width.bypass[1]),)
    return Axis(f"{block}.{width.name}", kind, block, width.units, tuple(sites), attributes, bypass, 0, width.entries)


def _join(placed: Sequence[Axis], name: str, tables: Sequence[str]) -> Axis:
    """One axis over all blocks, and over the tables they share; it can't go, as the tables can't."""
    from compress.layout import Site

    sites = [site for axis in placed for site in axis.sites] + [Site(table, 0) for table in tables]
    return replace(
        placed[0],
        name=name,
        block="",
        sites=tuple(sites),
        attributes=tuple(entry for axis in placed for entry in axis.attributes),
        bypass=(),
        least=1,
    )
