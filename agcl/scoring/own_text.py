"""Text that a model makes up itself: a sample of what it knows, without any data."""

from collections.abc import Callable, Sequence
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agcl.model.forward import Precision
from agcl.scoring.generate import generate
from agcl.tasks import Encoded

_BATCH_SIZE = 32
"""Part of what is drawn, as each batch has a seed of its own; so not a setting."""
_MARK = "\N{SNOWMAN}agcl\N{SNOWMAN}"


def own_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    tokens: int,
    seed: int,
    precision: Precision = "float32",
    log: Callable[[int], None] = lambda texts_done: None,
) -> list[Encoded]:
    """Texts of `tokens` new tokens that the model samples from its beginning-of-text token.

    Where the tokenizer has a chat template, every second one is a conversation: the template up to
    the user's words, from which the model writes them, and then its own answer to them (after
    Magpie, Xu 2024, arXiv 2406.08464); both end at their end token or after `tokens` tokens. See
    `generate` for how tokens are drawn. The prompt of a row is its first token, or the user's turn.
    Collective: same result on every rank.
    """

    def write(prompts: Sequence[Sequence[int]], end: Sequence[int], part: int) -> list[list[int]]:
        return generate(
            model,
            prompts,
            end=end,
            max_new_tokens=tokens,
            batch_size=_BATCH_SIZE,
            precision=precision,
            seed=seed * 3 + part,
        )

    found: list[Encoded] = []
    if turn := _user_turn(tokenizer):
        before, after = turn
        end = sorted({after[0], cast(int, tokenizer.eos_token_id)})
        said = [words for words in write([before] * (samples // 2), end, 0) if words]
        prompts = [[*before, *words, *after] for words in said]
        answers = write(prompts, end, 1)
        found = [
            Encoded([*prompt, *answer, after[0]], len(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer
        ]
        log(len(found))
    # A text goes on behind an end token, as it does where documents are packed for training.
    first = [start_token(tokenizer)]
    plain = write([first] * (samples - len(found)), (), 2)
    log(samples)
    return [*found, *(Encoded([*first, *text], 1) for text in plain)]


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token a text begins with: BOS, or for models without one their end-of-text token."""
    bos = tokenizer.bos_token_id
    return cast(int, tokenizer.eos_token_id if bos is None else bos)


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """The chat template's tokens before a user's words, and from them to the model's answer."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": _MARK}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, mark, after = cast(str, rendered).partition(_MARK)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after)]
    return (ids[0], ids[1]) if mark and all(ids) else None
