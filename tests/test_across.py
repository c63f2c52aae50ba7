"""Distillation across tokenizers: where tokens meet in a text, what is compared there, and a student that learns."""

import itertools
import json
import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from compress.data import Data, DataOptions
from compress.errors import TrainingError
from compress.families import layout_of
from compress.state import State, Teacher, Workshop
from compress.target import Target
from compress.tasks import TASKS
from passes.distillation.choice import Losses
from passes.distillation.compare import Comparison
from passes.distillation.losses import LOSSES
from passes.distillation.losses.across import binary_divergence, chunk_likelihoods, sorted_distance
from passes.distillation.losses.base import Seen
from passes.distillation.teachers import taught_by
from passes.distillation.translation import NOWHERE, Translation, aligned, decoder, marks, written
from tests.test_distill import distill, make_state
from tests.world import sentences

ACROSS = [name for name, cls in LOSSES.items() if cls.across]
TEXTS = [text for text, _ in sentences(200)]
ODD = "A naïve  fílm,\n\n 漢字 🙂🙂 and\tits score <x> e\u0301 "


def byte_level(size: int, end: str) -> transformers.PreTrainedTokenizerFast:
    """Tokens of bytes and their pairs, as GPT-2's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", end], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token="<pad>")


def pieces(size: int) -> transformers.PreTrainedTokenizerFast:
    """Pieces that begin with their space, and bytes for what is not among them, as Llama's."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    given = json.loads(inner.to_str())
    given["added_tokens"] = given["added_tokens"][:3]  # bytes are pieces like others
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(given)),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
    )  # fmt: skip


TOKENIZERS = {"fine": byte_level(270, "<end>"), "coarse": byte_level(330, "<|eot|>"), "pieces": pieces(340)}
PAIRS = list(itertools.permutations(TOKENIZERS, 2))


def ids_of(name: str, text: str) -> list[int]:
    return TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]


# Where tokens meet.


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_the_smallest_spans_with_a_common_end(seed):
    length = random.Random(seed).randint(1, 12)
    cuts = [sorted(random.Random(f"{seed}{side}").choices(range(1, length + 1), k=6)) for side in "ab"]
    found = aligned(*cuts)
    last, chunks = 0, []
    for end in range(1, length + 1):  # by trying every end
        if end in cuts[0] and end in cuts[1]:
            chunks.append([[place for place, one in enumerate(side) if last < one <= end] for side in cuts])
            last = end
    members = [[[place for place, one in enumerate(side) if one == chunk] for side in found] for chunk in range(99)]
    assert [one for one in members if any(one)] == chunks
    assert all(
        one == NOWHERE
        for side, cut in zip(found, cuts, strict=True)
        for one, end in zip(side, cut, strict=True)
        if end > last
    )


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [ODD, *TEXTS[:3]])
def test_a_text_is_written_token_by_token(name, text):
    ids = ids_of(name, text)
    back, ends = written(decoder(TOKENIZERS[name]), ids)
    assert back == text
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    for place, end in enumerate(ends, 1):
        alone = decoder(TOKENIZERS[name])(ids[:place])
        assert alone == text[:end] or alone.endswith("\ufffd")


def test_part_of_a_character_is_nowhere_and_the_rest_ends_with_it():
    ids = ids_of("fine", "a🙂b")
    assert written(decoder(TOKENIZERS["fine"]), ids) == ("a🙂b", [1, 2, 2, 2, 2, 3])
    assert written(decoder(TOKENIZERS["fine"]), ids[:3]) == ("a", [1, NOWHERE, NOWHERE])


def test_what_either_side_does_not_predict_counts_on_neither():
    # abc|d|ef|g and ab|c|d|efg: chunks abc, d, efg; of the first the first token has no prediction.
    counted, theirs, chunks, their_chunks = marks([3, 4, 6, 7], [2, 3, 4, 7], [True] * 4, 5)
    assert (counted, theirs) == ([True] * 3, [False, True, True])
    assert (chunks, their_chunks) == ([5, 6, 6], [NOWHERE, 5, 6])
    counted, theirs, chunks, their_chunks = marks([3, 4, 6, 7], [2, 3, 4, 7], [False, False, True, True], 0)
    assert (counted, theirs) == ([False, True, True], [False, False, True])
    assert (chunks, their_chunks) == ([NOWHERE, 0, 0], [NOWHERE, NOWHERE, 0])
    counted, theirs, *_ = marks([NOWHERE, 3, 4], [3, 4], [True] * 3, 0)  # a special token stands before one side alone
    assert (counted, theirs) == ([False, True], [True])


@pytest.mark.parametrize(("mine", "theirs"), PAIRS)
def test_a_translated_batch_says_the_same_and_chunks_are_the_same_text(mine, theirs):
    one, other = TOKENIZERS[mine], TOKENIZERS[theirs]
    rows = [
        [*ids_of(mine, ODD), one.eos_token_id, *ids_of(mine, TEXTS[0])],
        [*ids_of(mine, TEXTS[1]), one.eos_token_id],
        ids_of(mine, f"{TEXTS[2]} {one.eos_token[:2]}🙂")[:-1],
    ]
    length = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    ids = torch.tensor([[*row, *[one.pad_token_id] * (length - len(row))] for row in rows])
    found = Translation(one, other, None)({"input_ids": ids, "attention_mask": mask})
    theirs_ids, lengths = found.batch["input_ids"], found.batch["attention_mask"].sum(1).tolist()
    ends = [row[:size].tolist() for row, size in zip(theirs_ids, lengths, strict=True)]
    assert ends[0] == [*ids_of(theirs, ODD), other.eos_token_id, *ids_of(theirs, TEXTS[0])]
    assert ends[1][-1] == other.eos_token_id
    sides = ((one, ids, found.mine), (other, theirs_ids, found.theirs))
    count = int(found.mine.chunks.max()) + 1
    assert count > 10
    for chunk in range(count):
        texts = []
        for tokenizer, tokens, side in sides:
            rows, places = (side.chunks == chunk).nonzero(as_tuple=True)
            assert side.counted[rows, places].all()
            said = tokens[rows, places + 1].tolist()
            texts.append("end" if said == [tokenizer.eos_token_id] else decoder(tokenizer)(said).strip())
        assert texts[0] == texts[1]


def test_labels_say_what_counts_on_both_sides():
    ids = [*ids_of("fine", "the film is"), *ids_of("fine", " lively")]
    asked = len(ids_of("fine", "the film is"))
    batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    batch["labels"] = torch.tensor([[-100] * asked + ids[asked:]])
    found = Translation(TOKENIZERS["fine"], TOKENIZERS["coarse"], None)(batch)
    theirs = found.batch["input_ids"][0, 1:][found.theirs.counted[0, :-1]]
    assert decoder(TOKENIZERS["coarse"])(theirs.tolist()) == " lively"
    assert int(found.mine.counted.sum()) == len(ids) - asked


# What is compared.


def test_the_sorted_distance_is_the_least_over_all_ways_to_pair_classes():
    student, teacher = (torch.randn(6, size, generator=torch.Generator().manual_seed(size)) for size in (4, 5))
    padded = torch.nn.functional.pad(student.softmax(-1), (0, 1))
    ways = [padded[:, list(way)] - teacher.softmax(-1) for way in itertools.permutations(range(5))]
    least = torch.stack([one.abs().sum(-1) for one in ways]).min(0).values
    torch.testing.assert_close(sorted_distance(student, teacher), least)
    torch.testing.assert_close(sorted_distance(student[:, [2, 0, 3, 1]], teacher), least)
    torch.testing.assert_close(sorted_distance(teacher, student), least)


def test_rows_are_paired_by_their_number_within_a_text():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    mine, theirs = (torch.tensor(one).bool() for one in ([[0, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 1, 1], [0, 1, 0, 0]]))
    student, teacher = (
        Seen(one, predictions=one_logits, counted=one) for one, one_logits in ((mine, logits), (theirs, -logits))
    )
    pairs = sorted_distance(
        torch.stack([logits[0, 1], logits[0, 2], logits[1, 0]]),
        -torch.stack([logits[0, 0], logits[0, 1], logits[1, 1]]),
    )
    torch.testing.assert_close(LOSSES["uld"]().of(student, teacher), pairs.mean())


def test_the_likelihood_of_a_chunk_is_the_product_of_its_tokens():
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    p = logits.softmax(-1)
    found = chunk_likelihoods(logits, torch.tensor([3, 0, 2, 4]), torch.tensor([0, 1, 1, 0])).exp()
    torch.testing.assert_close(found, torch.stack([p[0, 3] * p[3, 4], p[1, 0] * p[2, 2]]))


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_a_binary_divergence_is_a_cross_entropy_less_what_is_least(temperature):
    q, p = (-torch.tensor(one, dtype=torch.float64) for one in ([0.1, 3.0, 40.0], [2.0, 3.0, 0.5]))
    b, a = (one.div(temperature).exp() for one in (q, p))
    entropies = [torch.nn.functional.binary_cross_entropy(one, a, reduction="none") for one in (b, a)]
    torch.testing.assert_close(binary_divergence(q, p, temperature), temperature * (entropies[0] - entropies[1]))
    limit = p - q + p * (p / q).log().neg()
    torch.testing.assert_close(binary_divergence(q, p, 1e6), limit, rtol=1e-3, atol=1e-9)


def test_a_divergence_of_sure_models_is_a_number():
    q = torch.tensor([0.0, -1.0, 0.0]).requires_grad_()
    loss = binary_divergence(q, torch.tensor([0.0, 0.0, -1.0]), 100.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert q.grad.isfinite().all()


# A student and its teacher.


def make_decoder(name: str, seed: int, folder) -> None:
    tokenizer = TOKENIZERS[name]
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def state(tmp_path) -> State:
    """A student of fine tokens, beside which lies a teacher of coarse ones."""
    for name, seed in (("fine", 1), ("coarse", 2)):
        make_decoder(name, seed, tmp_path / name)
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    task, tokenizer = TASKS["text-generation"], TOKENIZERS["fine"]
    data = Data.open(DataOptions(source=str(tmp_path / "texts.jsonl"), max_length=48), tokenizer, task)
    model = task.load(str(tmp_path / "fine"))
    workshop = Workshop(step=tmp_path / "step", run=tmp_path / "run")
    found = State(model, tokenizer, layout_of(model), task, Target(), workshop, Teacher(None, task), data)
    found.becomes_dense()
    return found


@pytest.mark.parametrize("name", ACROSS)
def test_a_student_learns_from_a_teacher_of_other_tokens(state, tmp_path, name):
    dense = state.dense
    teacher = str(tmp_path / "coarse")
    after = distill(state, losses={name: 1.0}, teachers=(teacher,), steps=30, batch_size=4, embeddings=True)
    assert after.figures["loss_after"] < 0.9 * after.figures["loss_before"]
    assert after.dense is dense
    with taught_by(state, ("dense",), across=True) as translation:
        assert translation is None


@pytest.mark.parametrize("name", ACROSS)
def test_a_twin_of_the_same_tokens_has_no_loss(state, tmp_path, name):
    batch = next(iter(state.data.batches("train", 4)))
    with taught_by(state, (str(tmp_path / "fine"),), across=True) as translation:
        assert translation is None
        assert Comparison(Losses(**{name: 1.0}), state).losses(state.model, batch)[name].abs() < 1e-6
    found = Translation(state.tokenizer, TOKENIZERS["fine"], None)(batch)
    assert torch.equal(found.batch["input_ids"][0], batch["input_ids"][0]), "translated or not, all is the same"
    through = Comparison(
        Losses(**{name: 1.0}), state, translation=Translation(state.tokenizer, TOKENIZERS["fine"], None)
    )
    assert through.losses(state.model, batch)[name].abs() < 1e-6


def test_a_row_is_as_long_as_the_teacher_can_take(state):
    batch = next(iter(state.data.batches("train", 4)))
    found = Translation(state.tokenizer, TOKENIZERS["coarse"], 7)(batch)
    assert found.batch["input_ids"].shape == (4, 7)
    assert 0 < len(found.mine.chunks.unique()) - 1 <= 4 * 6


@pytest.mark.parametrize("losses", [None, {"logits": 1.0}, {"uld": 1.0, "logits": 1.0}])
def test_other_losses_are_told_which_go_across(state, tmp_path, losses):
    with pytest.raises(TrainingError, match=r"reads other tokens, 330 of them and 270 here; .* but uld and alm"):
        distill(state, losses=losses, teachers=(str(tmp_path / "coarse"),))


def test_a_teacher_that_loses_text_is_refused(state, tmp_path):
    folder = tmp_path / "coarse"
    given = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**given, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(TrainingError, match=r"the teacher's tokenizer makes .it's 7.5"):
        distill(state, losses={"alm": 1.0}, teachers=(str(folder),))


@pytest.mark.parametrize("name", ACROSS)
def test_only_language_models_are_compared_across(tmp_path, name):
    with pytest.raises(TrainingError, match=f"loss '{name}' compares what language models expect of a text"):
        distill(make_state(tmp_path, "text-classification"), losses={name: 1.0})
