"""Text that a model makes up itself: a sample of what it knows, without any data."""

from collections.abc import Callable, Sequence
from typing import cast

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from agcl.model.forward import Precision
from agcl.scoring.generate import generate
from agcl.tasks import Encoded
from agcl.tasks.chat_template import around_user, template_of

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
    Magpie, Xu 2024, arXiv 2406.08464). The words end where the model writes what the template
    writes behind them, the answer at the token by which the template ends it, and both unfinished
    after `tokens` tokens. All are shorter where the model has fewer positions, and a template that
    leaves none is not used. See `generate` for how tokens are drawn. The prompt of a row is its
    first token, or the user's turn. Collective: same result on every rank.
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
        of_text = cast(int, tokenizer.eos_token_id)
        # A special token ends a turn; ordinary ones do so together, and each may be a word's.
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        first = [after[0]] if after[0] in special else []
        said = write([before] * (samples // 2), sorted({*first, of_text}), 0, most)
        prompts = [[*before, *words, *after] for each in said if (words := _up_to(after, each))]
        end = _end_of_answer(tokenizer, of_text)
        answers = write(prompts, sorted({end, of_text}), 1, most)
        found = [
            Encoded([*prompt, *answer, *[end][: len(answer) < most]], len(prompt))
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer
        ]
        log(len(found))
    # Where documents are packed for training, a text follows the end token of another.
    first = [start_token(tokenizer, model.config)]
    plain = write([first] * (samples - len(found)), (), 2, min(tokens, positions - 1))
    log(samples)
    return [*found, *(Encoded([*first, *text], 1) for text in plain)]


def _up_to(sequence: Sequence[int], ids: list[int]) -> list[int]:
    """The token ids before the first place where they hold a sequence."""
    size = len(sequence)
    places = (i for i in range(len(ids) - size + 1) if ids[i : i + size] == list(sequence))
    return ids[: next(places, len(ids))]


def _end_of_answer(tokenizer: PreTrainedTokenizerBase, of_text: int) -> int:
    """The token by which the chat template ends an answer, or else the end-of-text token."""
    end = template_of(tokenizer).end
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    return cast(int, ids[0]) if len(ids) == 1 else of_text


def start_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None = None) -> int:
    """The token a text begins with: BOS, or for models without one their end-of-text token.

    The tokenizer's or else, with the model's `config`, that of the config: of Qwen's chat models,
    whose end-of-sequence token ends a turn, only the config knows the end-of-text token. Raises
    `ValueError` if there is none.
    """
    known = (tokenizer.bos_token_id, getattr(config, "bos_token_id", None), tokenizer.eos_token_id)
    found = [token for token in known if token is not None]
    if not found:
        raise ValueError(f"the tokenizer in {tokenizer.name_or_path} has no BOS or EOS token")
    return cast(int, found[0])


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """The chat template's tokens before a user's words, and from them to the model's answer.

    None without a template that renders one user message, with its words once and as they are.
    """
    parts = around_user(tokenizer) or ()
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    return (ids[0], ids[1]) if len(ids) == 2 and all(ids) else None
