"""Exact match in one forward pass: the same verdict as greedy decoding."""

import weakref

import pytest
import torch
from reference import tiny

from agcl.model import adapter
from agcl.modulation import GatedAdamW
from agcl.scoring import evaluate
from agcl.scoring.evaluate import (
    answer_kl,
    answered_correctly,
    predict,
    text_loss,
    text_loss_and_kl,
)
from agcl.tasks.batches import answer_places, collate
from agcl.train import train_task


@pytest.fixture(scope="module")
def half_trained():
    """A model trained on the first half of the rows."""
    model, rows = tiny.llama(width=32), tiny.random_rows(16)
    optimizer = GatedAdamW(model.named_parameters(), lr=1e-2)
    train_task(model, rows[:8], optimizer, epochs=12, batch_size=8, micro_batch_size=8, seed=0)
    return model.eval(), rows


def generated(model, row):
    """Greedy decoding of the prompt, up to the end token."""
    prompt = torch.tensor([row.input_ids[: row.prompt_tokens]])
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(row.input_ids) - row.prompt_tokens,
        do_sample=False,
        eos_token_id=tiny.END,
        pad_token_id=0,
    )
    return output[0, row.prompt_tokens :].tolist()


def test_verdicts_equal_greedy_decoding_row_by_row(half_trained):
    model, rows = half_trained
    expected = [generated(model, row) == row.input_ids[row.prompt_tokens :] for row in rows]
    assert 3 <= sum(expected) <= len(rows) - 3, "both kinds must occur"
    assert tiny.exact_match(model, rows, batch_size=5) == expected


def test_verdicts_do_not_depend_on_batch_size_or_order(half_trained):
    model, rows = half_trained
    expected = tiny.exact_match(model, rows, batch_size=1)
    for batch_size in (3, 16, 100):
        assert tiny.exact_match(model, rows, batch_size=batch_size) == expected
    assert tiny.exact_match(model, rows[::-1], batch_size=3) == expected[::-1]


def test_evaluation_ignores_dropout_and_keeps_the_training_mode(half_trained):
    model, rows = half_trained
    expected = tiny.exact_match(model, rows, batch_size=4)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    try:
        assert tiny.exact_match(model, rows, batch_size=4) == expected
        assert model.training
    finally:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0
        model.eval()
    tiny.exact_match(model, rows, batch_size=4)
    assert not model.training


def test_one_wrong_token_anywhere_in_the_answer_is_wrong():
    rows = [tiny.Encoded([5, 6, 7, 8, 9], 2), tiny.Encoded([5, 6, 7], 2)]
    batch = collate(rows)
    right = torch.nn.functional.one_hot(batch.input_ids, tiny.VOCABULARY).float().roll(-1, 1)

    def verdict(logits):
        return answered_correctly(logits[:, :-1][answer_places(batch)], batch).tolist()

    assert verdict(right) == [True, True]
    # Positions 1, 2 and 3 predict row 0's answer; only position 1 predicts row 1's.
    for place, verdicts in enumerate(
        ([True, True], [False, False], [False, True], [False, True], [True, True])
    ):
        wrong = right.clone()
        wrong[:, place] = torch.nn.functional.one_hot(torch.tensor(2), tiny.VOCABULARY).float()
        assert verdict(wrong) == verdicts, place


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (lambda model, rows: predict(model, rows, batch_size=4), [0, 0, 0]),
        # A pass of the model has the logits of the base model's beside it.
        (lambda model, rows: answer_kl(model, tiny.llama(width=32), rows), [0, 1] * 4),
    ],
)
def test_logits_of_a_pass_are_gone_when_the_next_one_begins(score, expected, monkeypatch):
    alive, made, answer_logits = [], [], evaluate.answer_logits

    def passed(model, batch):
        alive.append(sum(each() is not None for each in made))
        logits = answer_logits(model, batch)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(evaluate, "answer_logits", passed)
    monkeypatch.setattr(evaluate, "PASS_TOKENS", 30)
    score(tiny.llama(width=32), tiny.random_rows(12))
    assert alive == expected


def test_no_rows_give_no_verdicts(half_trained):
    assert tiny.exact_match(half_trained[0], [], batch_size=4) == []


@pytest.mark.parametrize("length", [2, 64, 65, 66, 300])
def test_text_loss_is_the_mean_over_all_but_each_windows_first_token(length):
    model = tiny.llama(width=32)  # Maximum length: 64 tokens.
    ids = torch.randint(2, tiny.VOCABULARY, (length,)).tolist()
    losses = []
    for start in range(0, length, 64):
        window = torch.tensor([ids[start : start + 64]])
        with torch.no_grad():
            chances = model(window).logits.double().log_softmax(-1)[0]
        losses += [-float(chances[i, window[0, i + 1]]) for i in range(window.shape[1] - 1)]
    assert text_loss(model, ids) == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("length", [1, 63, 64, 300])
def test_with_a_start_token_every_token_of_the_text_counts(length):
    model = tiny.llama(width=32)
    ids = torch.randint(2, tiny.VOCABULARY, (length,)).tolist()
    losses = []
    for start in range(0, length, 63):
        window = torch.tensor([[7, *ids[start : start + 63]]])
        with torch.no_grad():
            chances = model(window).logits.double().log_softmax(-1)[0]
        losses += [-float(chances[i, window[0, i + 1]]) for i in range(window.shape[1] - 1)]
    assert len(losses) == length
    expected = pytest.approx(sum(losses) / length, rel=1e-6)
    assert text_loss(model, ids, start=7) == expected
    assert text_loss_and_kl(model, model, ids, start=7) == (expected, 0.0)


def test_a_text_of_one_token_has_no_loss():
    with pytest.raises(ValueError, match="nothing to predict"):
        text_loss(tiny.llama(), [3])


def naive_kl(model, base, rows):
    """KL(base || model) of every answer token, in float64 from all logits, a row at a time."""
    each = []
    for ids, prompt_tokens, *_ in rows:
        with torch.no_grad():
            of_base, of_model = (
                m(torch.tensor([ids])).logits[0, prompt_tokens - 1 : -1].double().log_softmax(-1)
                for m in (base, model)
            )
        each.append((of_base.exp() * (of_base - of_model)).sum(-1))
    return torch.cat(each)


def test_kl_is_the_mean_over_answer_tokens_of_the_naive_one():
    model, base, rows = tiny.llama(seed=1), tiny.llama(), tiny.random_rows(9)
    expected, other_way = naive_kl(model, base, rows), naive_kl(base, model, rows)
    assert answer_kl(model, base, rows) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert float(other_way.mean()) != pytest.approx(float(expected.mean()), rel=0.01)
    assert answer_kl(model, model, rows) == answer_kl(model, tiny.llama(seed=1), rows) == 0


@pytest.mark.parametrize("length", [2, 65, 300])
def test_kl_on_a_text_has_the_tokens_and_the_loss_of_text_loss(length):
    model, base = tiny.llama(seed=1), tiny.llama()
    ids = torch.randint(2, tiny.VOCABULARY, (length,)).tolist()
    windows = [(ids[i : i + 64], 1) for i in range(0, length, 64) if i + 1 < length]
    loss, kl = text_loss_and_kl(model, base, ids)
    assert loss == text_loss(model, ids)
    assert kl == pytest.approx(float(naive_kl(model, base, windows).mean()), rel=1e-5)


def test_kl_does_not_depend_on_how_tokens_are_grouped(monkeypatch):
    model, base, rows = tiny.llama(seed=1), tiny.llama().train(), tiny.random_rows(9)
    expected = answer_kl(model, base, rows)
    seen = []
    base.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    names = ("PASS_TOKENS", "PASS_ANSWERS", "LOGITS_TOKENS")
    for limits in ((1, 512, 128), (20, 512, 1), (2048, 3, 2)):
        for name, limit in zip(names, limits, strict=True):
            monkeypatch.setattr(f"agcl.scoring.evaluate.{name}", limit)
        seen.clear()
        assert answer_kl(model, base, rows[::-1]) == pytest.approx(expected, rel=1e-6)
        assert sum(lines for lines, _ in seen) == len(rows)
        assert all(lines == 1 or lines * tokens <= limits[0] for lines, tokens in seen)
        # An answer has one or two tokens and its end.
        assert all(lines == 1 or 2 * lines <= limits[1] for lines, _ in seen)
    assert base.training
    assert not model.training


def test_an_adapter_on_the_base_is_compared_with_the_base_without_it():
    base, rows = tiny.llama(), tiny.random_rows(9)
    peft_model = adapter.attach(tiny.llama(), rank=2, alpha=4.0, seed=0)
    model = peft_model.get_base_model()
    assert answer_kl(model, model, rows) == 0
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    trained[0].requires_grad_(False)
    expected = float(naive_kl(model, base, rows).mean())
    assert expected > 1e-3
    assert answer_kl(model, model, rows) == pytest.approx(expected, rel=1e-5)
    assert float(naive_kl(model, base, rows).mean()) == expected, "the adapter is on again"
    assert not trained[0].requires_grad
    assert trained[1].requires_grad


def test_without_rows_there_is_no_kl():
    with pytest.raises(ValueError, match="no answer token"):
        answer_kl(tiny.llama(), tiny.llama(), [])


def test_of_a_conversation_the_last_turn_decides():
    """As in scoring: attribution with `correct_only` takes the rows that are scored as right."""
    batch = collate([tiny.Encoded([3, 4, 5, 6, 7, 8], 4, ((1, 3),))])
    one_hot = torch.nn.functional.one_hot
    right = one_hot(batch.input_ids, tiny.VOCABULARY).float().roll(-1, 1)
    # Positions 0 and 1 predict the earlier turn, 3 and 4 the last one.
    for place, verdict in ((0, True), (1, True), (3, False), (4, False)):
        wrong = right.clone()
        wrong[:, place] = one_hot(torch.tensor(2), tiny.VOCABULARY).float()
        logits = wrong[:, :-1][answer_places(batch)]
        assert answered_correctly(logits, batch).tolist() == [verdict], place
