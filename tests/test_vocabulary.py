"""Vocabulary: texts of the kept tokens are split and computed as ever, to the bit; all others can still be read."""

from __future__ import annotations

import json
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from compress import checkpoint, compress
from compress.contract import VOCABULARY
from compress.data import Data, DataOptions
from compress.errors import DataError, LayoutError, PlanError
from compress.evaluate import evaluate
from compress.families import layout_of
from compress.plan import Plan, Tables
from compress.runner import Run, prepare
from compress.state import State, Teacher, Workshop
from compress.target import Target
from compress.tasks import TASKS
from compress.vocabulary import cut_vocabulary, named_tokens
from exporters import EXPORTERS
from passes import PASSES
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison
from passes.distillation.finetune import Finetune
from passes.pruning.tokens import ids_of, indispensable, narrow, parts_of, state_of
from passes.pruning.vocabulary import Vocabulary, choose
from tests.conftest import GENERATING, TINY, Tiny, assert_one_model
from tests.world import make_world

KEEP = list(range(8)) + list(range(11, 50, 3))
READING = [name for name, tiny in TINY.items() if tiny.inputs != "image"]


# The model: whatever the family, the kept rows compute what they did.


def kept_words(tiny: Tiny) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """An example in kept tokens only, and the same as the cut model reads it."""
    whole = tiny.example()
    cut = {name: x % len(KEEP) if name.endswith("input_ids") else x for name, x in whole.items()}
    kept = torch.tensor(KEEP)
    return {name: kept[x] if name.endswith("input_ids") else x for name, x in cut.items()}, cut


@pytest.mark.parametrize("name", READING)
def test_a_model_computes_the_same_for_kept_tokens(name, tmp_path):
    dense, model = TINY[name].build(), TINY[name].build()
    cut_vocabulary(model, KEEP)
    told, read = kept_words(TINY[name])
    with torch.no_grad():
        before, after = dense(**told, output_hidden_states=True), model(**read, output_hidden_states=True)
    for entry, values in after.items():
        if entry.endswith("hidden_states"):
            assert all(map(torch.equal, values, before[entry])), entry
    if dense.get_output_embeddings() is not None:
        assert torch.equal(after.logits, before.logits[..., KEEP])
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == len(KEEP)
    checkpoint.save(model, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    assert_one_model(loaded, model, read)
    assert layout_of(loaded) == layout_of(dense)


@pytest.mark.parametrize("name", GENERATING)
def test_what_was_tied_stays_tied(name):
    model = TINY[name].build()
    tied = [len({id(one) for one in part.values()}) for part in (dict(model.named_parameters(remove_duplicate=False)),)]
    cut_vocabulary(model, KEEP)
    assert [len({id(one) for _, one in model.named_parameters(remove_duplicate=False)})] == tied


def test_configs_follow():
    model = TINY["whisper"].build(pad_token_id=3, eos_token_id=[14, 11])
    model.generation_config.update(pad_token_id=3, eos_token_id=[14, 11], suppress_tokens=[9, 14, 17])
    model.generation_config.bos_token_id = 70  # a token the model never had
    cut_vocabulary(model, [1, 3, 11, 14, 17])
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (1, [3, 2], 0)
    assert (model.generation_config.suppress_tokens, model.generation_config.bos_token_id) == ([3, 4], None)
    assert model.get_decoder().embed_tokens.padding_idx == 1


@pytest.mark.parametrize(
    ("name", "keep", "met"),
    [
        ("vit", [0, 1], "reads no tokens"),
        ("llama", [0, 2, 3], "token 1 of its config left out"),
        ("llama", [0, 1, 53], "tokens 0..53 of 53"),
        ("mpnet", [1, 2, 3], "token 0 of its config left out"),
    ],
)
def test_models_and_tokens_that_do_not_fit_are_refused(name, keep, met):
    with pytest.raises(LayoutError, match=met):
        cut_vocabulary(TINY[name].build(), keep)


def test_positions_that_count_from_the_padding_token_keep_it_in_place():
    model = TINY["roberta"].build(pad_token_id=5)
    assert named_tokens(model) >= set(range(6))


# The tokenizer: every kind splits texts of kept tokens as it did, and can read any text.

LINES = [line for topic in sorted(topics)[:24] for line in topics[topic].splitlines() if line.strip()]
DOMAIN, OTHERS = LINES[:150], LINES[150:600]
ENDS = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def trained(model, kind, pre, size, decoder, framing, **names):
    """A tokenizer trained on all the lines."""
    inner = Tokenizer(model)
    inner.normalizer, inner.pre_tokenizer, inner.decoder = normalizers.NFKC(), pre, decoder
    special = {"special_tokens": list(names.values())}
    if kind is trainers.UnigramTrainer:
        special["unk_token"] = names["unk_token"]
    if isinstance(pre, pre_tokenizers.ByteLevel):
        special["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(LINES, kind(vocab_size=size, show_progress=False, **special))
    inner.post_processor = framing(inner.token_to_id)
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)


def template(number):
    ends = [(token, number(token)) for token in ("<s>", "</s>")]
    return processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B:1 </s>:1", ends)


def roberta(number):
    return processors.RobertaProcessing(("</s>", number("</s>")), ("<s>", number("<s>")))


def bert(number):
    return processors.Sequence([processors.BertProcessing(("[SEP]", number("[SEP]")), ("[CLS]", number("[CLS]")))])


def byte_pairs():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(models.BPE(), trainers.BpeTrainer, byte_level, 900, decoders.ByteLevel(), roberta, **ENDS)


def fallback():
    """As Llama's: a character that is no piece is spelled in bytes, and every split of a piece is a merge."""
    pre = pre_tokenizers.Metaspace()
    made = trained(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, pre, 700, decoders.Metaspace(), template, **ENDS)
    state = json.loads(made.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words |= {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    ranked = sorted((number, word) for word, number in words.items() if not word.startswith("<"))
    pairs = [[word[:at], word[at:]] for _, word in ranked for at in range(1, len(word))]
    state["model"] |= {"byte_fallback": True, "merges": [pair for pair in pairs if {*pair} <= words.keys()]}
    steps = [decoders.ByteFallback(), decoders.Metaspace()]
    inner = Tokenizer.from_str(json.dumps(state))
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **ENDS)


def unigram():
    pre = pre_tokenizers.Metaspace()
    return trained(models.Unigram(), trainers.UnigramTrainer, pre, 700, decoders.Metaspace(), template, **ENDS)


def word_pieces():
    names = ("unk_token", "sep_token", "cls_token", "pad_token", "mask_token")
    special = dict(zip(names, ("[UNK]", "[SEP]", "[CLS]", "[PAD]", "[MASK]"), strict=True))
    model, pre = models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer()
    return trained(model, trainers.WordPieceTrainer, pre, 900, decoders.WordPiece(), bert, **special)


def class_of_bert():
    """The class of BERT builds its own tokenizer from the words it is given."""
    return transformers.BertTokenizer(vocab=word_pieces().get_vocab(), do_lower_case=False, model_max_length=64)


def words():
    model, pre = models.WordLevel(unk_token="<unk>"), pre_tokenizers.Whitespace()
    return trained(model, trainers.WordLevelTrainer, pre, 900, None, template, **ENDS)


TOKENIZERS = {
    "byte-level BPE": byte_pairs,
    "BPE with bytes to fall back on": fallback,
    "Unigram": unigram,
    "WordPiece": word_pieces,
    "BertTokenizer": class_of_bert,
    "WordLevel": words,
}
LOSSLESS = ("byte-level BPE", "BPE with bytes to fall back on")


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request):
    """A tokenizer, the same narrowed to what the lines of the domain need, the ids it kept, and its kind."""
    tokenizer = TOKENIZERS[request.param]()
    state = state_of(tokenizer)
    counts = np.bincount(np.concatenate([tokenizer(line)["input_ids"] for line in DOMAIN]), minlength=len(tokenizer))
    ids = ids_of(state)
    must = {ids[token] for token in indispensable(state, [token for token in ids if counts[ids[token]]])}
    kept = choose(counts, must, parts_of(state), 1.0, None)
    return tokenizer, narrow(tokenizer, kept), kept, request.param


def test_texts_of_kept_tokens_are_split_as_before(pair):
    tokenizer, narrowed, kept, _ = pair
    assert len(kept) < 0.9 * len(tokenizer)
    known = [line for line in OTHERS if set(tokenizer(line)["input_ids"]) <= set(kept)]
    assert len(known) > 20, "too few held-out lines to tell"
    for line in [*DOMAIN, *known]:
        for texts in ((line,), (line, DOMAIN[0])):
            before, after = tokenizer(*texts), narrowed(*texts)
            assert [kept[token] for token in after["input_ids"]] == before["input_ids"]
            assert after.get("token_type_ids") == before.get("token_type_ids")


def test_tokens_are_numbered_in_their_order(pair):
    tokenizer, narrowed, kept, _ = pair
    assert sorted(narrowed.get_vocab().values()) == list(range(len(narrowed))) == list(range(len(kept)))
    assert narrowed.convert_ids_to_tokens(list(range(len(kept)))) == tokenizer.convert_ids_to_tokens(kept)
    assert narrowed.special_tokens_map == tokenizer.special_tokens_map
    assert (type(narrowed), narrowed.model_max_length) == (type(tokenizer), tokenizer.model_max_length)


def test_any_text_can_be_encoded(pair):
    tokenizer, narrowed, _, kind = pair
    for line in [*OTHERS, "naïve ⊕ 漢字 🙂"]:
        ids = narrowed(line, add_special_tokens=False)["input_ids"]
        assert ids
        assert (
            kind not in LOSSLESS
            or narrowed.decode(ids).strip()
            == tokenizer.decode(tokenizer(line, add_special_tokens=False)["input_ids"]).strip()
        )
    familiar = [line for line in OTHERS if {*line} <= {*"".join(DOMAIN)}]
    unknown = [[one(line)["input_ids"].count(one.unk_token_id) for line in familiar] for one in (tokenizer, narrowed)]
    assert kind == "WordLevel" or unknown[0] == unknown[1]
    assert len(familiar) > 100


def test_a_narrowed_tokenizer_saves_and_loads(pair, tmp_path):
    narrowed = pair[1]
    narrowed.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == narrowed.get_vocab()
    assert [loaded(line)["input_ids"] for line in LINES[:200]] == [narrowed(line)["input_ids"] for line in LINES[:200]]


class Slow(PreTrainedTokenizer):
    def __init__(self):
        self.letters = {"<unk>": 0, "a": 1}
        super().__init__(unk_token="<unk>")

    @property
    def vocab_size(self):
        return 2

    def get_vocab(self):
        return dict(self.letters)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(DataError, match="Slow is a slow tokenizer"):
        state_of(Slow())


# The choice.


@pytest.mark.parametrize(
    ("coverage", "most", "kept"),
    [
        (1.0, None, [0, 1, 2, 3, 4, 6]),
        (0.6, None, [0, 4, 6]),  # 50 + 10 of 100
        (0.95, None, [0, 1, 2, 3, 4, 6]),  # the token of 30 brings its parts along
        (1.0, 5, [0, 4, 6]),  # which are too many here, and nothing else occurs
    ],
)
def test_the_most_frequent_stay_with_their_parts(coverage, most, kept):
    counts, parts = np.array([10, 5, 5, 30, 50, 0, 0]), {3: [1, 2], 4: [6]}
    if most:
        counts[[1, 2]] = 0
    assert choose(counts, {0}, parts, coverage, most) == kept


def test_too_small_a_vocabulary_is_told():
    with pytest.raises(DataError, match="keep is 1; expected at least 2"):
        choose(np.array([1, 1]), {0, 1}, {}, 1.0, 1)


# The pass, its teacher and a whole run.


def make_state(folder, task_name="text-generation", lines=DOMAIN) -> State:
    source = folder / "lines.txt"
    source.write_text("\n".join(lines))
    task, tokenizer = TASKS[task_name], byte_pairs() if task_name == "text-generation" else word_pieces()
    data = Data.open(DataOptions(source=str(source), max_length=32), tokenizer, task)
    tiny = {"text-generation": "llama-tied", "fill-mask": "roberta"}.get(task_name, "bert")
    # a few rows more than there are tokens, as where the rows are padded
    model = TINY[tiny].build(vocab_size=len(tokenizer) + 7, max_position_embeddings=66, pad_token_id=1)
    state = State(
        model, tokenizer, layout_of(model), task, Target(), Workshop(folder / "a", folder / "b"),
        Teacher(None, task), data,
    )  # fmt: skip
    state.becomes_dense()
    return state


@pytest.mark.parametrize("task", ["text-generation", "fill-mask", "feature-extraction"])
def test_the_pass_leaves_the_data_and_what_is_computed_of_it(task, tmp_path):
    state = make_state(tmp_path, task)
    dense, before = state.dense.model, state.data
    (after,) = Vocabulary().run(state)
    kept = after.facts[VOCABULARY.name]["kept"]
    assert len(after.tokenizer) == len(kept) == after.model.config.vocab_size < dense.config.vocab_size
    for split in ("train", "calibration", "validation"):
        theirs, mine = before.split(split).encoded.sequences, after.data.split(split).encoded.sequences
        assert all((kept[x["input_ids"]].numpy() == y["input_ids"]).all() for x, y in zip(mine, theirs, strict=True))
    batch = {name: x for name, x in next(after.data.batches("validation", 4)).items() if name != "labels"}
    whole = {**batch, "input_ids": kept[batch["input_ids"]]}
    if task == "fill-mask":  # padding is at 1 in the model and elsewhere in the tokenizer
        batch, whole = ({name: x[:1] for name, x in one.items()} for one in (batch, whole))
    with torch.no_grad():
        mine, theirs, taught = after.model.eval()(**batch)[0], dense(**whole)[0], after.teacher(**batch)[0]
    theirs = theirs if task == "feature-extraction" else theirs[..., kept]
    assert torch.equal(mine, theirs)
    assert torch.equal(taught, theirs)
    figures = after.figures
    assert figures["coverage"] == 1
    assert figures["test_tokens"]["after"] >= figures["test_tokens"]["before"] > 0
    assert len(figures["warnings"]) == 1 + after.task.packs
    assert figures["tokens"]["after"] == len(kept)
    assert figures["parameters"]["after"] == after.model.num_parameters() < figures["parameters"]["before"]
    scores = evaluate(after.model, after.data, after.task, teacher=after.teacher)
    assert all(np.isfinite(score.value) for score in scores.values())
    assert scores["kl"].value == 0 if "kl" in scores else scores["cosine"].value == pytest.approx(1)


def test_the_teacher_shares_all_but_the_vocabulary(tmp_path):
    (after,) = Vocabulary().run(make_state(tmp_path))
    dense = {id(parameter) for parameter in after.dense.model.parameters()}
    own = [name for name, parameter in after.teacher.named_parameters() if id(parameter) not in dense]
    assert own == ["model.embed_tokens.weight"]
    assert len(after.dense.tokenizer if after.dense.source else byte_pairs()) > len(after.tokenizer)


@pytest.mark.parametrize("losses", [{"logits": 1.0, "hidden": 1.0}, {"hidden": 1.0}], ids=["predictions", "states"])
def test_recovery_compares_among_the_kept_tokens(losses, tmp_path):
    (after,) = Vocabulary(coverage=0.8).run(make_state(tmp_path))
    after.model.eval()
    with torch.no_grad():
        compare = Comparison(Losses(**losses), after)
        found = compare.losses(compare.student, next(after.data.batches("train", 4)))
    assert {name: float(loss) for name, loss in found.items()} == dict.fromkeys(losses, 0.0)


def test_a_second_cut_remembers_the_dense_tokens(tmp_path):
    (first,) = Vocabulary().run(make_state(tmp_path))
    words = first.dense.model.config.vocab_size
    once = first.facts[VOCABULARY.name]["kept"]
    (second,) = Vocabulary(coverage=0.7).run(first)
    twice = second.facts[VOCABULARY.name]["kept"]
    assert len(twice) < len(once) < words
    assert set(twice.tolist()) < set(once.tolist())
    assert byte_pairs().convert_ids_to_tokens(twice.tolist()) == second.tokenizer.convert_ids_to_tokens(
        list(range(len(twice)))
    )


@pytest.mark.parametrize("options", [{"keep": 420}, {"coverage": 0.6}], ids=["keep", "coverage"])
def test_bounds_are_kept(options, tmp_path):
    (after,) = Vocabulary(**options).run(make_state(tmp_path))
    figures = after.figures
    assert figures["tokens"]["must_stay"] <= figures["tokens"]["after"] <= options.get("keep", 10**6)
    assert options.get("coverage", 0) <= figures["coverage"] < 1
    scores = evaluate(after.model, after.data, after.task)
    assert np.isfinite(scores["perplexity"].value)


def test_both_bounds_are_one_too_many():
    with pytest.raises(ValueError, match="both bound the tokens"):
        Vocabulary(keep=100, coverage=0.9)


@pytest.mark.parametrize(
    ("spoil", "met"),
    [
        (lambda state: setattr(state, "tokenizer", None), "has no tokenizer"),
        (lambda state: setattr(state, "data", None), "has no texts"),
        (lambda state: state.tokenizer.add_tokens([f"<{n}>" for n in range(9)], special_tokens=True), "none for '<"),
    ],
    ids=["no tokenizer", "no data", "tokens without rows"],
)
def test_what_can_not_be_cut_is_told(spoil, met, tmp_path):
    state = make_state(tmp_path)
    spoil(state)
    with pytest.raises((DataError, LayoutError), match=met):
        next(Vocabulary().run(state))


def test_a_finetuned_model_is_the_teacher_of_its_own_tokens(tmp_path):
    (after,) = Vocabulary().run(make_state(tmp_path))
    (tuned,) = Finetune(steps=1, batch_size=4, precision="float32").run(after)
    assert tuned.teacher is tuned.dense.model
    assert tuned.dense.model.config.vocab_size == len(tuned.tokenizer)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    make_world(folder)
    return folder


def test_later_steps_and_judges_read_the_new_tokens_and_the_dense_model_its_own(world, tmp_path):
    values = {
        "model": str(world / "my-encoder"),
        "data": {"source": str(world / "reviews.txt")},
        "passes": ["vocabulary", {"distill": {"steps": 2, "batch_size": 8}}],
    }
    run = Run(Plan.read(values, Tables(PASSES, EXPORTERS)), prepare(tmp_path / "out", fresh=True))
    (leaf,) = run.go()
    for node in (leaf, *leaf.parents):
        state = run.state(node)
        assert len(state.tokenizer) == len(state.data.tokenizer) == state.model.config.vocab_size < 64
        assert state.data is run.state(node).data, "texts are tokenized once, however often a state is read"
        scores = evaluate(state.model, state.data, state.task, teacher=state.teacher)
        assert scores["cosine"].value == pytest.approx(1, abs=1e-3)
    dense = state.as_dense()
    assert (dense.model, dense.data) == (state.dense.model, run.data)
    assert evaluate(dense.model, dense.data, dense.task, teacher=dense.teacher)["cosine"].value == pytest.approx(1)


def test_the_plan_tells_wrong_options():
    with pytest.raises(PlanError, match="coverage"):
        compress(plan={"model": "nowhere", "passes": [{"vocabulary": {"coverage": 2}}]})
