"""One call from rows, as users have them, to an importance or bases."""

import copy

import pytest
import torch
from datasets import Dataset
from reference import chat, tiny

from agcl.attribution import attribute
from agcl.integrations.transformers import attribute_dataset, protect_base, tokenize_rows
from agcl.model import adapter
from agcl.modulation import bases
from agcl.scoring.own_text import own_texts
from agcl.tasks import Encoded, Row
from agcl.tasks.batches import collate

END = tiny.END


def assert_close(found, expected):
    assert found.header["rows_attributed"] == expected.header["rows_attributed"]
    for name, moment in expected.moments.items():
        matrix = found.moments[name].matrix()
        torch.testing.assert_close(matrix, moment.matrix(), rtol=1e-4, atol=1e-4, msg=name)


TOKENIZED = [
    {"input_ids": [5, 6, 7, END], "labels": [-100, -100, 7, END]},
    {"input_ids": [8, 9, 2, END], "labels": [-100, -100, 2, END]},
]


@pytest.mark.parametrize(
    "rows",
    [
        [Row("w5 w6", " w7"), Row("w8 w9", " w2")],
        [{"prompt": "w5 w6", "answer": " w7"}, {"prompt": "w8 w9", "answer": " w2"}],
        [{"prompt": "w5 w6", "completion": " w7"}, {"prompt": "w8 w9", "completion": " w2"}],
        TOKENIZED,
        Dataset.from_list(TOKENIZED),
        [{"input_ids": [5, 6, 7, 1], "completion_mask": [0, 0, 1, 1]},
         {"input_ids": [8, 9, 2, 1], "completion_mask": [0, 1, 1, 1],
          "assistant_masks": [1, 0, 1, 1]}],
    ],
)  # fmt: skip
def test_rows_of_every_kind_have_the_same_tokens_and_labels(tokenizer, rows):
    assert tokenize_rows(tokenizer, rows) == TOKENIZED


def test_a_rendered_conversation_keeps_its_one_bos(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "w3"
    for text in ("w5 w6", "w3 w5 w6"):
        assert tokenize_rows(tokenizer, [text])[0]["input_ids"] == [3, 5, 6]


def test_of_a_text_every_token_but_the_start_counts_and_long_ones_are_cut(tokenizer):
    found = {"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7]}
    assert tokenize_rows(tokenizer, ["w5 w6 w7", {"text": "w5 w6 w7"}]) == [found] * 2
    (cut,) = tokenize_rows(tokenizer, ["w5 w6 w7"], max_tokens=2)
    assert cut == {"input_ids": [1, 5], "labels": [-100, 5]}


def test_importances_equal_those_of_attribute(llama, tokenizer):
    rows = tiny.answered_rows(llama, 9, wrong=(2,))
    expected = attribute(llama, [collate(rows)], moments="answer", entries=True)
    given = [{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n, _ in rows]
    for batch_size in (2, 16):
        found = attribute_dataset(
            llama, tokenizer, Dataset.from_list(given), batch_size=batch_size, correct_only=True,
            moments="answer", entries=True,
        )  # fmt: skip
        assert_close(found, expected)
        for name, entries in expected.entries.items():
            torch.testing.assert_close(found.entries[name], entries, rtol=1e-4, atol=1e-5)


def test_several_turns_of_a_conversation_count(llama, tokenizer):
    """Labels need not be the end of a row; other tokens have no say with `moments="answer"`."""
    ids = [2, 3, 4, 5, 6, 7, 8, 9]
    labels = [-100, -100, 4, -100, -100, -100, 8, -100]
    found = attribute_dataset(
        llama, tokenizer, [{"input_ids": ids, "labels": labels}], moments="answer"
    )
    parts = [
        attribute(llama, [collate([Encoded(ids[:n], n - 1)])], moments="answer", entries=False,
                  correct_only=False)
        for n in (3, 7)
    ]  # fmt: skip
    for name, moment in found.moments.items():
        expected = parts[0].moments[name].matrix() + parts[1].moments[name].matrix()
        torch.testing.assert_close(moment.matrix(), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_only_rows_with_an_answer_as_text_must_be_right_by_default(llama, tokenizer):
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(2, 8)]
    assert attribute_dataset(llama, tokenizer, texts).header["rows_attributed"] == 6
    rows = [{"prompt": text, "answer": " w3"} for text in texts]
    with pytest.raises(ValueError, match="none of the 6 rows correctly"):
        attribute_dataset(llama, tokenizer, rows)
    found = attribute_dataset(llama, tokenizer, rows, correct_only=False)
    assert found.header["rows_attributed"] == 6


def test_a_models_wrappers_flags_and_mode_do_not_matter(llama, tokenizer):
    texts = ["w5 w6 w7", "w9 w8"]
    expected = attribute_dataset(llama, tokenizer, texts)
    other = copy.deepcopy(llama).train()
    other.model.embed_tokens.requires_grad_(False)
    wrapped = torch.nn.DataParallel(torch.compile(other, backend="eager"))
    assert_close(attribute_dataset(wrapped, tokenizer, texts), expected)
    assert other.training
    assert not other.model.embed_tokens.weight.requires_grad
    assert all(p.grad is None for p in other.parameters())
    found = attribute_dataset(adapter.attach(other, rank=2, alpha=2, seed=0), tokenizer, texts)
    name = "model.layers.0.mlp.up_proj"
    moments = [
        importance.moments[importance.input_of(f"{name}{factor}.weight")].matrix()
        for importance, factor in ((found, ".lora_A.default"), (expected, ""))
    ]
    torch.testing.assert_close(*moments, rtol=1e-4, atol=1e-4)


def test_the_assistants_turns_of_a_conversation_count():
    vocabulary = chat.tokenizer()
    (row,) = tokenize_rows(vocabulary, [{"messages": chat.MESSAGES}])
    whole = vocabulary.apply_chat_template(chat.MESSAGES, tokenize=False)
    assert whole.startswith(vocabulary.decode(row["input_ids"]))
    counted = vocabulary.decode([label for label in row["labels"] if label != -100])
    turns = [m["content"] for m in chat.MESSAGES if m["role"] == "assistant"]
    assert len(turns) > 1
    # One begins with line ends, which are in a token with the template's own.
    assert counted == "".join(turn.lstrip() + chat.END for turn in turns)


def test_rows_without_a_token_that_counts_are_left_out(llama, tokenizer):
    empty = {"input_ids": [5, 6], "labels": [-100, -100]}
    found = attribute_dataset(llama, tokenizer, [*TOKENIZED, empty])
    assert found.header["rows"] == 2
    with pytest.raises(ValueError, match="none of the 1 rows has a token"):
        attribute_dataset(llama, tokenizer, [empty])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "row 1: no assistant message"),
        (
            {"messages": [*chat.MESSAGES[:2], {"role": "assistant", "content": " "}]},
            "row 1: .*blank",
        ),
        ({"question": "w5"}, r"row 1 \(\['question'\]\) is not a text"),
        (3, r"row 1 \(int\) is not"),
        ({"prompt": [{"role": "user"}], "completion": []}, "row 1"),
        ({"input_ids": [5, 6], "labels": [5, 7]}, "row 1: its labels"),
        ({"input_ids": [5, 6], "labels": [5]}, "row 1: its labels"),
    ],
)
def test_other_rows_are_named(llama, tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        attribute_dataset(llama, tokenizer, ["w5", row])


def test_the_base_is_protected_by_its_own_text(llama, tokenizer):
    found = protect_base(llama, tokenizer, samples=6, tokens=5, energy=0.6, batch_size=4)
    texts = own_texts(llama, tokenizer, samples=6, tokens=5, seed=0)
    importance = attribute(
        llama, [collate(texts)], moments="uniform", entries=False, correct_only=False
    )
    with pytest.raises(ValueError, match="bfloat16"):
        protect_base(tiny.llama(dtype=torch.bfloat16), tokenizer)
    for name, basis in bases([importance], energy=0.6).items():
        assert found[name].shape == basis.shape
        overlap = (found[name].T @ basis).norm() ** 2 / basis.shape[1]
        assert overlap == pytest.approx(1, abs=1e-3), name


def test_tensors_of_a_dataset_are_numbers(llama, tokenizer):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
            {"input_ids": [5, 6, 8], "labels": [-100] * 3}]  # fmt: skip
    found = attribute_dataset(llama, tokenizer, Dataset.from_list(rows).with_format("torch"))
    assert found.header["rows"] == 1
