"""Batched greedy decoding against one row at a time, without a cache."""

import pytest
import torch
from reference import families, tiny
from reference import workers as remote

from agcl.scoring.generate import generate

LONGEST = 8
PROMPTS = [[(7 * i + 3 * j) % 38 + 2 for j in range(1 + (5 * i) % 11)] for i in range(9)]


@pytest.fixture(scope="module")
def model():
    return tiny.llama(dtype=torch.float64)


def one_by_one(model, prompt, end):
    """Argmax token by token, each time over the whole text."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + LONGEST:
            best = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if best == end:
                break
            ids.append(best)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def end(model):
    """A token that the model generates after a few others, for some prompts only."""
    free = [one_by_one(model, prompt, None) for prompt in PROMPTS]
    counts = {t: sum(t in ids[1:] for ids in free) for ids in free for t in ids[1:]}
    return next(t for t, count in counts.items() if 1 < count < len(PROMPTS) - 1)


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_batches_decode_like_single_rows(model, end, batch_size):
    expected = [one_by_one(model, prompt, end) for prompt in PROMPTS]
    assert len({len(ids) for ids in expected}) > 1
    found = generate(model, PROMPTS, end=end, max_new_tokens=LONGEST, batch_size=batch_size)
    assert found == expected


def test_the_models_generation_config_is_ignored(model, end):
    expected = generate(model, PROMPTS, end=end, max_new_tokens=LONGEST, batch_size=4)
    configured = model.generation_config
    configured.do_sample, configured.temperature, configured.repetition_penalty = True, 9.0, 5.0
    configured.eos_token_id, configured.num_beams, configured.min_new_tokens = 3, 2, 7
    model.train()
    try:
        found = generate(model, PROMPTS, end=end, max_new_tokens=LONGEST, batch_size=4)
        assert found == expected
        assert model.generation_config is configured
        assert model.training
    finally:
        model.eval()
        model.generation_config = tiny.llama().generation_config


@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_texts_end_at_the_last_position_and_others_are_not_cut_for_them(batch_size):
    """GPT-2 has no embedding for a position behind its last; the batch decides nothing."""
    gpt2 = families.model("GPT2LMHeadModel", max_position_embeddings=12, n_positions=12)
    prompts = [PROMPTS[0], list(range(2, 12)), PROMPTS[2][:4], list(range(2, 11))]
    found = generate(gpt2, prompts, end=[], max_new_tokens=LONGEST, batch_size=batch_size)
    for prompt, ids in zip(prompts, found, strict=True):
        room = min(LONGEST, 12 - len(prompt))
        alone = generate(gpt2, [prompt], end=[], max_new_tokens=room, batch_size=1)[0]
        assert ids[:room] == alone
        assert not any(ids[room:])  # Filled up.


def test_no_prompts_give_no_continuations(model):
    assert generate(model, [], end=1, max_new_tokens=3, batch_size=2) == []


def test_two_ranks_generate_the_same_as_one(workers):
    options = {"end": tiny.END, "max_new_tokens": LONGEST, "batch_size": 2}
    expected = remote.generated(PROMPTS, {"seed": 0}, **options)
    assert workers.run(remote.generated, PROMPTS, {"seed": 0}, **options) == [expected, expected]
