"""Text that a model makes up itself: a sample of what it knows, without any data."""

from collections.abc import Callable, Sequence
from typing import cast

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from agcl.model.forward import Precision
from agcl.scoring.generate import generate
from agcl.tasks import Encoded
from agcl.tasks.chat_template import around_user

_BATCH_SIZE = 32
"""Part of what is drawn, as each batch has a seed of its own; so not a setting."""


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

    Where the tokenizer has a chat template for a user's words, every second one is a conversation:
    the template up to them, from which the model writes them, and then its own answer (after
    Magpie, Xu 2024, arXiv 2406.08464); both end at their end token, or unfinished after `tokens`
    tokens. All are shorter where the model has fewer positions, and a template that leaves none is
    not used.
    See `generate` for how tokens are drawn. The prompt of a row is its first token, or the user's
    turn. Collective: same result on every rank.
    """

    def write(
        prompts: Sequence[Sequence[int]], end: Sequence[int], part: int, most: int
    ) -> list[list[int]]:
        return generate(
            model,
            prompts,
            end=end,
            max_new_tokens=most,
            batch_size=_BATCH_SIZE,
            precision=precision,
            seed=seed * 3 + part,
        )

    found: list[Encoded] = []
    positions = model.config.max_position_embeddings
    before, after = _user_turn(tokenizer) or ([], [])
    # The user's words and the answer share what the template and an end token leave.
    most = min(tokens, (positions - len(before) - len(after) - 1) // 2)
    if before and most > 0:
        end = sorted({after[0], cast(int, tokenizer.eos_token_id)})
        said = [words for words in write([before] * (samples // 2), end, 0, most) if words]
        prompts = [[*before, *words, *after] for words in said]
        answers = write(prompts, end, 1, most)
        found = [
            Encoded([*prompt, *answer, *after[: len(answer) < most]], len(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer
        ]
        log(len(found))
    # A text goes on behind an end token, as it does where documents are packed for training.
    first = [start_token(tokenizer, model.config)]
    plain = write([first] * (samples - len(found)), (), 2, min(tokens, positions - 1))
    log(samples)
    return [*found, *(Encoded([*first, *text], 1) for text in plain)]


def start_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None) -> int:
    """The token a text begins with: BOS, or for models without one their end-of-text token.

    The tokenizer's or else, with the model's `config`, that of the config: of Qwen's chat models,
    whose end-of-sequence token ends a turn, only the config knows the end-of-text token.
    """
    known = (tokenizer.bos_token_id, getattr(config, "bos_token_id", None), tokenizer.eos_token_id)
    return cast(int, next(token for token in known if token is not None))


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """The chat template's tokens before a user's words, and from them to the model's answer.

    None without a template that renders one user message, with its words once and as they are.
    """
    parts = around_user(tokenizer) or ()
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    return (ids[0], ids[1]) if len(ids) == 2 and all(ids) else None
