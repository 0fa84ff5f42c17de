"""Text that a model makes up itself: a sample of what it knows, without any data."""

from collections.abc import Callable, Sequence
from typing import cast

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from agcl.model.forward import Precision
from agcl.scoring.generate import generate
from agcl.tasks import Encoded
from agcl.tasks.chat_template import around_user, template_of

_BATCH_SIZE = 32
"""Not a setting: each batch has a separate seed, so the batch size changes the sampled texts."""


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
    """Sample `samples` texts of `tokens` new tokens from the model's beginning-of-text token.

    If the tokenizer has a chat template, every second text is a conversation (after Magpie, Xu
    2024, arXiv 2406.08464): from the template's text before a user message, the model writes the
    message, and then its answer. The message ends where the model writes the text that the template
    puts after it, the answer at the template's end token; both are cut off after `tokens` tokens.
    Texts are shorter if the model has fewer positions, and a template that leaves no room is not
    used. See `generate` for the sampling. The prompt of a row is its first token, or the user's
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
        of_text = cast(int, tokenizer.eos_token_id)
        # A special token ends a turn; ordinary ones do so together, and each may be a word's.
        first = [after[0]] if after[0] in _special(tokenizer) else []
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


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


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

    The first of these that exists: the tokenizer's BOS, the BOS of the model's `config` if given,
    the tokenizer's EOS. Qwen's chat models need the `config`: their EOS ends a turn, and only the
    config has the end-of-text token. Raises `ValueError` if there is none.
    """
    of_config = getattr(config, "bos_token_id", None)
    if of_config not in _special(tokenizer):  # A default of the config's class, such as 1.
        of_config = None
    known = (tokenizer.bos_token_id, of_config, tokenizer.eos_token_id)
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
