"""How long a config's longest rows are, found by tokenizing few of them."""

import json
from heapq import nlargest

from agcl.model import models
from agcl.tasks import Row, encode
from agcl.tasks.encoding import encoded_rows

from pipeline.config.config import Config
from pipeline.config.sources import base_rows, open_task, selection, sources

LONGEST = 8
"""Rows per split that are tokenized: those with the most characters, and with the longest answer.
One with fewer characters rarely has more tokens."""

_OF_TEMPLATE = 64
"""Tokens of a chat template around two turns, system message included; most have fewer."""


def max_length(config: Config) -> int:
    """Most tokens of a row: `tasks.max_length`, or fewer that the model has positions for."""
    if config.model.is_builtin:
        return config.tasks.max_length
    return min(config.tasks.max_length, models.positions(config.model.folder))


def base_tokens(config: Config) -> int:
    """Tokens of each text that the base model is measured on, without its start token."""
    if config.model.is_builtin:
        return config.base.tokens
    return min(config.base.tokens, models.positions(config.model.folder) - 1)


def longest_of_base(config: Config) -> tuple[int, int] | None:
    """Tokens of the longest row that the base model is measured on, and of those with loss.

    None if it is not measured.
    """
    if not config.measures_base:
        return None
    if given := base_rows(config):
        return longest_row(given)
    most, words = models.positions(config.model.folder), base_tokens(config)
    if config.base.protect == "self" and models.load_tokenizer(config.model.folder).chat_template:
        return min(most, 2 * words + _OF_TEMPLATE), words  # A user's words and the answer.
    return words + 1, words


def longest_row(config: Config) -> tuple[int, int]:
    """Tokens of the longest row of all tasks, and tokens with loss of the row with most of them.

    Of rows that fit in `tasks.max_length` and in the model, or were cut to it.
    """
    tokenizer, most = models.load_tokenizer(config.model.folder), max_length(config)
    tokens = answer = 1
    for source in sources(config):
        task = open_task(source.settings, source.files, selection(config, source))
        for read in task.splits.values():
            rows = nlargest(LONGEST, read(), key=size)
            rows += nlargest(LONGEST, read(), key=lambda row: len(row.answer))
            for row in encoded_rows(encode(tokenizer, rows, chat=config.tasks.chat_template)):
                length = min(most, len(row.input_ids))
                tokens, answer = max(tokens, length), max(answer, min(length, row.loss_tokens))
    return tokens, answer


def size(row: Row) -> int:
    """Characters of the text; of a conversation also those of its tools and their calls."""
    talk = row.conversation
    if talk is None:
        return len(row.prompt) + len(row.answer)
    beside = [talk.tools, [message.get("tool_calls") for message in talk.messages]]
    words = sum(len(message["content"]) for message in talk.messages)
    return words + len(json.dumps(beside, ensure_ascii=False))
