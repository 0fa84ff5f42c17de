"""Multiple-choice probes against one full forward pass per choice, and against lm-eval itself."""

import json
import random

import numpy as np
import pytest
import torch
from reference import families, sharded
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from agcl.errors import InputError
from agcl.model.builtin import builtin_tokenizer
from agcl.scoring.probes import Question, read, score

WORDS = "river stone lantern orchard copper violin harbour meadow thistle ember".split()
VOCABULARY = 400
LLAMA = "LlamaForCausalLM"


def questions():
    """Of 2 to 4 choices, behind contexts of no token up to more than the model has positions."""
    drawn = random.Random(0)
    said = [" ".join(drawn.choices(WORDS, k=n)) for n in (0, 0, 1, 1, 2, 3, 5, 8, 10, 60, 75)]
    said[2], said[3], said[4] = "a", said[3] + "  ", said[4] + " \n "
    return [
        Question(
            context,
            [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 5))) for _ in range(2 + i % 3)],
            i % 2,
        )
        for i, context in enumerate(said)
    ]


QUESTIONS = questions()


@pytest.fixture(scope="module")
def tokenizer():
    return builtin_tokenizer([" ".join(WORDS)] * 4, vocab_size=VOCABULARY)


def model_of(architecture, dtype=torch.float32):
    return families.model(architecture, dtype=dtype, vocab_size=VOCABULARY)


@torch.no_grad()
def one_by_one(model, tokenizer, question):
    """The log-likelihood of every choice, from a full forward pass without cache or padding."""
    context, found = question.context.rstrip(), []
    behind = question.context[len(context) :]
    before = tokenizer(context)["input_ids"] if context else [tokenizer.eos_token_id]
    for choice in question.choices:
        ids = [*before, *tokenizer(f"{context}{behind} {choice}")["input_ids"][len(before) :]]
        if not context:
            ids = [*before, *tokenizer(f"{behind} {choice}")["input_ids"]]
        count = len(ids) - len(before)
        ids = torch.tensor([ids[-(model.config.max_position_embeddings + 1) :]])
        chances = model(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
        chosen = chances.gather(-1, ids[0, 1:, None])[-count:]
        found.append(float(chosen.sum()))
    return found


@pytest.mark.parametrize("architecture", families.CONFIGS)
def test_log_likelihoods_match_a_forward_pass_per_choice(architecture, tokenizer):
    model, exact = model_of(architecture), model_of(architecture, torch.float64)
    limit = model.config.max_position_embeddings
    lengths = [len(tokenizer(question.context)["input_ids"]) for question in QUESTIONS]
    assert min(lengths) == 0
    assert 1 in lengths
    assert max(lengths) > limit
    for question, found in zip(
        QUESTIONS, score(model, tokenizer, QUESTIONS, batch_size=12), strict=True
    ):
        expected = one_by_one(exact, tokenizer, question)
        assert found.log_likelihoods == pytest.approx(expected, rel=2e-5)
        assert found.by_sum == np.argmax(expected)
        sizes = [len(choice) for choice in question.choices]
        assert found.by_length == np.argmax(np.array(expected) / sizes)


def test_both_choices_differ_for_some_questions(tokenizer):
    found = score(model_of(LLAMA), tokenizer, QUESTIONS, batch_size=12)
    assert any(each.by_sum != each.by_length for each in found)
    assert len({each.by_sum for each in found}) > 1


def test_results_do_not_depend_on_the_batch_size(tokenizer):
    model = model_of(LLAMA)
    expected = score(model, tokenizer, QUESTIONS, batch_size=1)
    for batch_size in (7, 1000):
        for found, alone in zip(
            score(model, tokenizer, QUESTIONS, batch_size=batch_size), expected, strict=True
        ):
            assert found.log_likelihoods == pytest.approx(alone.log_likelihoods, rel=1e-4)
            assert found[1:] == alone[1:]


def test_a_choice_of_one_token_is_predicted_by_the_contexts_last_one(tokenizer):
    model = model_of(LLAMA)
    question = Question("river stone", ["stone", "ember", "copper"], 0)
    ids = tokenizer([" stone", " ember", " copper"])["input_ids"]
    assert [len(each) for each in ids] == [1, 1, 1]
    with torch.no_grad():
        read = torch.tensor([tokenizer("river stone")["input_ids"]])
        chances = model(read).logits[0, -1].log_softmax(-1)
    (found,) = score(model, tokenizer, [question], batch_size=8)
    expected = [float(chances[each[0]]) for each in ids]
    assert found.log_likelihoods == pytest.approx(expected, rel=1e-5)


def test_equal_choices_are_a_tie_that_the_first_one_wins(tokenizer):
    (found,) = score(model_of(LLAMA), tokenizer, [Question("a", ["ember"] * 3, 1)], batch_size=8)
    assert found[1:] == (0, 0)


def test_the_context_runs_once_and_the_head_on_what_predicts_choices(tokenizer):
    model = model_of(LLAMA)
    question = Question(" ".join(WORDS), ["stone ember", "river", "copper copper copper"], 0)
    seen, predicted = [], []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(args[0].numel())
    )
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: predicted.append(output.shape[:-1].numel())
    )
    score(model, tokenizer, [question], batch_size=8)
    context = len(tokenizer(question.context)["input_ids"])
    choices = [len(tokenizer(f" {choice}")["input_ids"]) for choice in question.choices]
    assert seen == [context - 1, 3 * max(choices)]
    assert predicted == [1, sum(choices)]


def test_scoring_ignores_dropout_and_keeps_the_training_mode(tokenizer):
    model = model_of("MistralForCausalLM")  # Drops half of its attention.
    expected = score(model, tokenizer, QUESTIONS[:4], batch_size=8)
    model.train()
    assert score(model, tokenizer, QUESTIONS[:4], batch_size=8) == expected
    assert model.training


def test_no_questions_give_no_scores(tokenizer):
    assert score(model_of(LLAMA), tokenizer, [], batch_size=8) == []


def test_a_choice_longer_than_the_model_is_refused(tokenizer):
    question = Question("a", ["stone", " ".join(WORDS * 9)], 0)
    with pytest.raises(InputError, match=r"choice 'river .* of the question 'a' has .* 1 to 64"):
        score(model_of(LLAMA), tokenizer, [question], batch_size=8)


def test_ranks_score_the_same_with_a_sharded_model(workers, tokenizer):
    """The second rank runs out of batches first, and contexts of one token are in some only."""
    expected = sharded.probed(LLAMA, tokenizer, QUESTIONS)
    for found in workers.run(sharded.probed, LLAMA, tokenizer, QUESTIONS):
        for each, alone in zip(found, expected, strict=True):
            assert each.log_likelihoods == pytest.approx(alone.log_likelihoods, rel=1e-5)
            assert each[1:] == alone[1:]


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_questions_are_read_from_json_lines(tmp_path):
    rows = [question._asdict() for question in QUESTIONS]
    assert read(write(tmp_path / "some.jsonl", *rows)) == QUESTIONS


GOOD = {"context": "a", "choices": ["b", "c"], "answer": 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["b", "c"], "answer": 1}, "no column 'context'"),
        ({"context": "a", "choices": ["b", "c"]}, "no column 'answer'"),
        ({"context": "a", "answer": 0}, "'choices' must be a list of at least two texts"),
        (GOOD | {"choices": ["b"], "answer": 0}, "'choices' must be a list of at least two texts"),
        (GOOD | {"choices": "bc"}, "'choices' must be a list of at least two texts"),
        (GOOD | {"choices": ["b", None]}, "'choices' is null, not text"),
        (GOOD | {"choices": ["b", " "]}, "a choice is empty"),
        (GOOD | {"answer": 2}, "'answer' must be an index, 0 to 1, not 2"),
        (GOOD | {"answer": -1}, "'answer' must be an index, 0 to 1, not -1"),
        (GOOD | {"answer": True}, "'answer' must be an index, 0 to 1, not true"),
        (GOOD | {"answer": 0.5}, "'answer' must be an index, 0 to 1, not 0.5"),
        (["a"], "a list, not a JSON object"),
    ],
)
def test_a_bad_question_names_file_and_line(tmp_path, row, said):
    file = write(tmp_path / "some.jsonl", GOOD, row)
    with pytest.raises(InputError) as raised:
        read(file)
    assert str(raised.value).startswith(f"{file}, line 2: {said}")


def test_a_file_that_holds_no_questions_is_named(tmp_path):
    file = tmp_path / "some.jsonl"
    for content, said in ((b"\n", f"{file}: no question"), (b"{\n", f"{file}, line 1: not JSON")):
        file.write_bytes(content)
        with pytest.raises(InputError) as raised:
            read(file)
        assert str(raised.value).startswith(said)


def with_bos(tokenizer):
    """The tokenizer, putting BOS before every text as Llama's does."""
    backend, end = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), tokenizer.eos_token
    backend.post_processor = TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end)


@pytest.mark.parametrize("bos", [False, True])
def test_log_likelihoods_acc_and_acc_norm_are_those_of_lm_eval(tokenizer, tmp_path, bos):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    if bos:
        tokenizer = with_bos(tokenizer)
        assert tokenizer("river")["input_ids"][0] == tokenizer.bos_token_id
    # lm-eval's own template would drop white space around a context.
    several = [q for q in QUESTIONS if q.context == q.context.strip()]
    file = write(tmp_path / "probe.jsonl", *(question._asdict() for question in several))
    model = model_of(LLAMA)
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu"),
        tasks=[
            {
                "task": "probe",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": str(file), "cache_dir": str(tmp_path)},
                "test_split": "train",
                "output_type": "multiple_choice",
                "doc_to_text": "context",
                "doc_to_choice": "choices",
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        ],
        bootstrap_iters=0,
    )
    scored = score(model, tokenizer, several, batch_size=12)
    samples = sorted(found["samples"]["probe"], key=lambda sample: sample["doc_id"])
    for sample, each, question in zip(samples, scored, several, strict=True):
        theirs = [float(values[0]) for values in sample["filtered_resps"]]
        assert each.log_likelihoods == pytest.approx(theirs, rel=1e-5)
        assert (each.by_sum == question.answer) == sample["acc"]
        assert (each.by_length == question.answer) == sample["acc_norm"]
