"""Tokenized rows: where the answer starts and ends, and the memory-mapped file."""

from dataclasses import replace

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from agcl.model.builtin import builtin_tokenizer
from agcl.tasks import SCHEMA, Encoded, EncodedRows, Row, encode, messages
from agcl.tasks.encoding import cut_left, encoded_rows

ROWS = [
    Row("Question: Where does Bako live?\nShort answer:", " Rome"),
    Row("Wo wohnt Žofie 🦔?", " München"),
    Row("2+2=", "4"),
]
SPACED = [*ROWS, Row("Ends with a space: ", "Rome"), Row("Where?", " Rome (Italy)")]


@pytest.fixture(scope="module")
def tokenizer():
    return builtin_tokenizer([row.prompt + row.answer for row in ROWS] * 4, vocab_size=300)


@pytest.fixture
def framing_tokenizer():
    """Adds a start and an end token to every text, as some pretrained tokenizers do."""
    tokenizer = builtin_tokenizer([row.prompt for row in ROWS], vocab_size=300)
    tokenizer.add_special_tokens({"bos_token": "<start>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>",
        special_tokens=[
            ("<start>", tokenizer.bos_token_id),
            ("<end>", tokenizer.eos_token_id),
        ],
    )
    return tokenizer


def spaced_tokenizer(scheme):
    """Puts a space before a text, as SentencePiece's do: by Metaspace, or Llama 2's normalizer."""
    bpe = Tokenizer(tokenizer_models.BPE(unk_token="<unk>"))
    if scheme == "legacy":
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        replaced = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        bpe.decoder = decoders.Sequence(replaced)
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>", "<start>", "<end>"], show_progress=False
    )
    bpe.train_from_iterator([f"{row.prompt}{row.answer}" for row in SPACED] * 20, trainer)
    bpe.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    )


def encoded(table):
    return [Encoded(r["input_ids"], r["prompt_tokens"]) for r in table.to_pylist()]


def write(file, *tables):
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)
    return file


def test_prompt_answer_and_end_are_concatenated(tokenizer):
    table = encode(tokenizer, iter(ROWS))
    assert table.schema == SCHEMA
    for row, (ids, prompt_tokens, _) in zip(ROWS, encoded(table), strict=True):
        assert tokenizer.decode(ids[:prompt_tokens]) == row.prompt
        assert tokenizer.decode(ids[prompt_tokens:-1]) == row.answer
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1]
    assert table["prompt"].to_pylist() == [row.prompt for row in ROWS]
    assert table["answer"].to_pylist() == [row.answer for row in ROWS]


def test_the_prompt_has_the_same_tokens_as_in_generation(tokenizer):
    """Even where prompt and answer would merge into one token if encoded together."""
    merging = builtin_tokenizer(["abab abab abab"] * 50, vocab_size=280)
    [(ids, prompt_tokens, _)] = encoded(encode(merging, [Row("a", "b")]))
    assert ids[:prompt_tokens] == merging("a")["input_ids"]
    assert ids != [*merging("ab")["input_ids"], merging.eos_token_id]


@pytest.mark.parametrize("scheme", ["always", "first", "never", "legacy"])
@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_has_the_tokens_that_it_has_behind_its_prompt(scheme, chat):
    tokenizer = spaced_tokenizer(scheme)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for row, (ids, prompt_tokens, _) in zip(
        SPACED, encoded(encode(tokenizer, SPACED, chat=chat)), strict=True
    ):
        alone = tokenizer(row.prompt, add_special_tokens=not chat)["input_ids"]
        assert ids[:prompt_tokens] == (alone if chat else alone[:-1])
        assert (ids[0], ids[-1]) == (ids[0] if chat else 1, 2)
        answer = row.answer.lstrip() if chat else row.answer
        assert tokenizer.decode(ids, skip_special_tokens=True) == row.prompt + answer


def word_piece_tokenizer():
    """Starts a text with [CLS] and ends it with [SEP], as BERT's; splits words into pieces."""
    texts = [f"{row.prompt} {row.answer}" for row in SPACED]
    words = Tokenizer(tokenizer_models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(cleanup=False)
    special = ["[UNK]", "[CLS]", "[SEP]"]
    words.train_from_iterator(
        texts * 20,
        trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False),
    )
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]"
    )


def test_pieces_of_words_follow_the_prompt_as_in_the_whole_text():
    tokenizer = word_piece_tokenizer()
    for row in (Row("Where does Bako live?", " Rome"), Row("Where?", " Rome (Italy)")):
        [(ids, prompt_tokens, _)] = encoded(encode(tokenizer, [row]))
        whole = tokenizer(row.prompt + row.answer)["input_ids"]
        assert ids == whole
        assert ids[:prompt_tokens] == tokenizer(row.prompt)["input_ids"][:-1]


@pytest.mark.parametrize("scheme", ["always", "first", "never", "legacy"])
def test_turns_of_a_conversation_have_the_tokens_of_the_whole_text(scheme):
    """With a tokenizer that puts spaces before texts, behind special tokens too."""
    tokenizer = spaced_tokenizer(scheme)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<model>", "<stop>"]})
    tokenizer.chat_template = (
        "{{ '<start>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<user>' + m.content }}"
        "{% else %}{{ '<model>' + m.content }}{% endif %}{{ '<stop>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
    )
    talk = [
        {"role": role, "content": content.strip()}
        for row in SPACED[:1] + SPACED[3:]
        for role, content in (("user", row.prompt), ("assistant", row.answer))
    ]
    [row] = encoded_rows(encode(tokenizer, [messages.row_of(talk, None, "x")]))
    assert row.input_ids == tokenizer.apply_chat_template(talk)["input_ids"]
    asked = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True)["input_ids"]
    assert row.input_ids[: row.prompt_tokens] == asked
    said = [tokenizer.decode(row.input_ids[a:b]).strip() for a, b in row.spans]
    assert [text.removesuffix("<stop>") for text in said] == ["Rome", "Rome", "Rome (Italy)"]
    assert all(text.endswith("<stop>") for text in said)


@pytest.mark.parametrize(
    ("row", "length", "cut"),
    [
        (Encoded([9, 4, 5, 6, 7, 8], 4), 6, Encoded([9, 4, 5, 6, 7, 8], 4)),
        (Encoded([9, 4, 5, 6, 7, 8], 4), 4, Encoded([9, 6, 7, 8], 2)),
        (Encoded([9, 4, 5, 6, 7, 8], 4), 3, None),  # BOS alone would be no prompt.
        (Encoded([3, 4, 5, 6, 7, 8], 4), 3, Encoded([6, 7, 8], 1)),
        (Encoded([3, 4, 5, 6, 7, 8], 4), 2, None),
        (
            Encoded([9, 4, 5, 6, 7, 8], 5, ((1, 2), (3, 5))),
            5,
            Encoded([9, 5, 6, 7, 8], 4, ((2, 4),)),
        ),
        (Encoded([9, 4, 5, 6, 7, 8], 5, ((1, 4),)), 4, Encoded([9, 6, 7, 8], 3, ((1, 2),))),
        (Encoded([3, 4, 5, 6, 7, 8], 5, ((0, 3),)), 4, Encoded([5, 6, 7, 8], 3)),
    ],
)
def test_a_long_prompt_is_cut_at_its_beginning_behind_a_special_token(row, length, cut):
    assert cut_left(row, length, {9}) == cut


@pytest.mark.parametrize(
    ("length", "kept", "cut"),
    [
        (7, 3, Encoded([9, 4, 5, 6, 7, 8, 3], 5)),
        (6, 3, Encoded([9, 4, 5, 7, 8, 3], 4)),
        (5, 3, None),
        (5, 2, Encoded([9, 4, 7, 8, 3], 3)),
        (4, 0, Encoded([9, 7, 8, 3], 2)),
    ],
)
def test_what_is_kept_at_the_start_of_a_prompt_is_not_cut(length, kept, cut):
    assert cut_left(Encoded([9, 4, 5, 6, 7, 8, 3], 5), length, {9}, kept) == cut


@pytest.mark.parametrize("chat", [False, True])
def test_kept_characters_become_kept_tokens(tokenizer, framing_tokenizer, chat):
    row = Row("Question: Where does Bako live?\nShort answer:", " Rome", kept=len("Question:"))
    for each in (tokenizer, framing_tokenizer, spaced_tokenizer("legacy")):
        each.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
        found = encode(each, [row, row, Row("2+2=", "4")], chat=chat)
        ids, kept = found["input_ids"][0].as_py(), found["kept"].to_pylist()
        assert kept == [kept[0], kept[0], 0]
        before = each.decode(ids[: kept[0]], skip_special_tokens=True)
        # A token that starts with the colon may go on with the space behind it.
        assert before.removesuffix(" ") == ("user Question:" if chat else "Question:")
        each.chat_template = None


def test_references_round_trip(tmp_path, tokenizer):
    table = encode(tokenizer, [Row("2+2=", "4", references=("four", "IV")), ROWS[0]])
    rows = EncodedRows(write(tmp_path / "rows.arrow", table))
    assert rows.table["references"].to_pylist() == [["four", "IV"], None]


def test_conversations_round_trip(tmp_path, tokenizer):
    table = encode(tokenizer, ROWS[:2])
    spans = pa.array([[[1, 2], [3, 4]], None], SCHEMA.field("earlier").type)
    place = table.schema.get_field_index("earlier")
    write(tmp_path / "rows.arrow", table.set_column(place, SCHEMA.field("earlier"), spans))
    rows = EncodedRows(tmp_path / "rows.arrow")
    assert [row.earlier for row in rows] == [((1, 2), (3, 4)), ()]


def test_an_end_token_in_the_answers_text_is_not_doubled(tokenizer, framing_tokenizer):
    for each in (tokenizer, framing_tokenizer):
        [plain, ending] = encoded(encode(each, [Row("a", " b"), Row("a", " b<end>")]))
        assert plain == ending


def test_special_tokens_are_only_before_the_prompt_and_after_the_answer(framing_tokenizer):
    start, end = framing_tokenizer.bos_token_id, framing_tokenizer.eos_token_id
    for ids, prompt_tokens, _ in encoded(encode(framing_tokenizer, ROWS)):
        assert ids[0] == start
        assert start not in ids[1:]
        assert ids[-1] == end
        assert end not in ids[:-1]
        assert 1 < prompt_tokens < len(ids) - 1


@pytest.mark.parametrize(("text", "starts"), [("", 1), ("<start>", 1), ("<start><start>", 2)])
def test_a_prompt_that_begins_with_bos_gets_no_second_one(framing_tokenizer, text, starts):
    start, row = framing_tokenizer.bos_token_id, Row(ROWS[0].prompt, " Rome")
    table = encode(framing_tokenizer, [replace(row, prompt=text + row.prompt, kept=len(text) + 8)])
    [found], [plain] = encoded_rows(table), encoded_rows(encode(framing_tokenizer, [row]))
    more = starts - 1
    assert found.input_ids == [start] * more + plain.input_ids
    assert found.prompt_tokens == plain.prompt_tokens + more
    kept = encode(framing_tokenizer, [replace(row, kept=8)])["kept"][0].as_py()
    assert table["kept"][0].as_py() == kept + (more if starts > 1 else 0)


def test_rows_round_trip_through_a_memory_mapped_file(tmp_path, tokenizer):
    table = encode(tokenizer, ROWS)
    rows = EncodedRows(write(tmp_path / "rows.arrow", table, table.slice(1)))
    expected = encoded(table) + encoded(table)[1:]
    assert len(rows) == 5
    assert list(rows) == expected
    assert [rows[i] for i in (4, 0, -1)] == [expected[i] for i in (4, 0, -1)]
    with pytest.raises(IndexError):
        rows[5]


def test_an_empty_table_round_trips(tmp_path, tokenizer):
    table = encode(tokenizer, [])
    assert table.schema == SCHEMA
    assert len(EncodedRows(write(tmp_path / "rows.arrow", table))) == 0
