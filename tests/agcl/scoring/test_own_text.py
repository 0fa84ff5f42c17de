"""Text that a model writes itself."""

import pytest
import torch
from reference import families, tiny
from reference import workers as remote
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agcl.scoring.own_text import own_texts, start_token

WORDS = {f"w{i}": i for i in range(tiny.VOCABULARY)}
TEMPLATE = (
    "{% for m in messages %}w2 {% if m.role == 'user' %}w3{% else %}w4{% endif %} {{ m.content }} "
    "w5 {% endfor %}{% if add_generation_prompt %}w2 w4{% endif %}"
)
BEFORE, AFTER = [2, 3], [5, 2, 4]


def tokenizer(template=None, **special):
    words = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", **special)
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def model():
    return tiny.llama(spread=0.1)


def written(model, template=None, *, samples=40, tokens=6, seed=0):
    made = tokenizer(template, additional_special_tokens=["w5", "w6"])
    return own_texts(model, made, samples=samples, tokens=tokens, seed=seed)


def test_texts_have_the_asked_number_and_length_and_begin_at_the_start(model):
    for ids, prompt_tokens, _ in written(model):
        assert (ids[0], len(ids), prompt_tokens) == (1, 1 + 6, 1)
    assert len(written(model, samples=7)) == 7


def test_a_seed_gives_the_same_texts_and_another_seed_others(model):
    torch.manual_seed(1)
    first = written(model)
    state = torch.random.get_rng_state()
    assert written(model) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert written(model, seed=1) != first
    assert len({tuple(ids) for ids, *_ in first}) > 30


def test_tokens_are_drawn_from_the_models_distribution(model):
    """First tokens of many texts, against the model's probabilities without their tail."""
    texts = written(model, samples=4000, tokens=1)
    counts = torch.bincount(torch.tensor([ids[1] for ids, *_ in texts]), minlength=40) / len(texts)
    with torch.no_grad():
        expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    order = expected.argsort(descending=True)
    tail = order[expected[order].cumsum(0) - expected[order] > 0.98]
    expected[tail] = 0
    expected /= expected.sum()
    assert float(counts[tail].sum()) == 0
    assert float((counts - expected).abs().sum()) / 2 < 0.05


def test_with_a_template_every_second_text_answers_words_that_the_model_made_up(model):
    texts = written(model, TEMPLATE)
    talks = [text for text in texts if text.prompt_tokens > 1]
    assert 15 <= len(talks) <= 20
    assert len(texts) == 40
    for ids, prompt_tokens, _ in talks:
        prompt, answer = ids[:prompt_tokens], ids[prompt_tokens:]
        assert prompt[:2] == BEFORE
        assert prompt[-3:] == AFTER
        assert 1 <= len(prompt[2:-3]) <= 6
        assert not {1, 5} & {*prompt[2:-3], *answer[:-1]}
        assert answer[-1] == 5 or len(answer) == 6  # Cut, it has no end.
    assert {ids[-1] == 5 for ids, *_ in talks} == {True, False}


MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}w2 {{ m.content }} w5 {% else %}"
    "{{ m.content }} w6 {% endif %}{% endfor %}"
)
IN_WORDS = (
    "{% for m in messages %}{% if m.role == 'user' %}w2 {{ m.content }} w7 w8 {% else %}"
    "{{ m.content }} w1 {% endif %}{% endfor %}"
)


def test_an_answer_ends_as_the_template_ends_it_not_as_the_users_words_do(model):
    talks = [text for text in written(model, MISTRAL) if text.prompt_tokens > 1]
    assert talks
    for ids, prompt_tokens, _ in talks:
        assert ids[prompt_tokens - 1] == 5
        assert 6 not in ids[prompt_tokens:-1]
        assert ids[-1] == 6 or len(ids) - prompt_tokens == 6
    assert {ids[-1] == 6 for ids, *_ in talks} == {True, False}


def test_ordinary_tokens_end_the_users_words_together(model):
    """As a line end and `### Response:`; a line end alone may be one of the words."""
    talks = [t for t in written(model, IN_WORDS, samples=400) if t.prompt_tokens > 1]
    words = [ids[1 : prompt_tokens - 2] for ids, prompt_tokens, _ in talks]
    assert any(7 in each for each in words)
    assert not any([7, 8] in ([*each][i : i + 2] for i in range(len(each))) for each in words)
    assert all(ids[-1] == 1 or len(ids) - prompt == 6 for ids, prompt, _ in talks)


@pytest.mark.parametrize(
    "template",
    [
        "w2 {{ messages[0].content | upper | length }}",
        "{{ 'w2' }}",
        "w2 {{ messages[0].content }} w3 {{ messages[0].content }} w4",
        "{{ raise_exception('the first message must be of the system') }}",
        "w2 {{ messages[0].content",
        "w2 {{ messages[0].content }} w3" + " w4" * 62,
    ],
)
def test_a_template_that_has_no_place_for_the_users_words_gives_texts_only(model, template):
    assert all(prompt_tokens == 1 for _, prompt_tokens, _ in written(model, template))


def test_texts_fit_the_models_positions():
    model = families.model("GPT2LMHeadModel", dtype=torch.float32, max_position_embeddings=16)
    texts = written(model, TEMPLATE, tokens=40)
    assert {len(ids) for ids, prompt_tokens, _ in texts if prompt_tokens == 1} == {16}
    assert {prompt_tokens > 1 for _, prompt_tokens, _ in texts} == {False, True}
    assert max(len(ids) for ids, *_ in texts) <= 16


def test_the_start_is_bos_or_else_the_end_of_text():
    assert start_token(tokenizer(bos_token="w7")) == 7
    assert start_token(tokenizer()) == 1
    # Qwen's chat tokenizers have no BOS, and end a turn, not a text, by their end token.
    config = families.model("GPT2LMHeadModel", bos_token_id=9).config
    assert start_token(tokenizer(additional_special_tokens=["w9"]), config) == 9
    assert start_token(tokenizer(), config) == 1  # A word: the default of a config's class.


def test_progress_is_told(model):
    told = []
    own_texts(model, tokenizer(TEMPLATE), samples=6, tokens=3, seed=0, log=told.append)
    assert told == sorted(told)
    assert told[-1] == 6


def test_ranks_write_the_same_texts(workers):
    """More than one batch, so that each rank draws some of them."""
    prompts, options = [[1]] * 5, {"end": (), "max_new_tokens": 4, "batch_size": 2, "seed": 3}
    expected = remote.generated(prompts, {"seed": 0}, **options)
    assert len({tuple(ids) for ids in expected}) > 1
    assert workers.run(remote.generated, prompts, {"seed": 0}, **options) == [expected, expected]
