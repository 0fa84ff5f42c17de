"""From rows as users have them to token ids with labels, and from these to an importance."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from agcl.attribution.attribute import attribute, check_precision
from agcl.importance import Importance
from agcl.integrations.names import unwrapped
from agcl.modulation.projection import bases
from agcl.parallel import distributed
from agcl.scoring.own_text import own_texts, start_token
from agcl.tasks import Row, is_empty
from agcl.tasks.batches import IGNORED, Batch, by_length, collate, in_order
from agcl.tasks.encoding import encode, encoded_rows
from agcl.tasks.layouts import LAYOUTS

_MASKS = ("completion_mask", "assistant_masks")
_ANSWERS = ("answer", "completion")
_KINDS = (
    "a text, a Row, or a dict with 'text', 'messages', 'prompt' and 'answer' (or 'completion'), "
    "or 'input_ids' and perhaps 'labels'"
)


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Any],
    *,
    max_tokens: int | None = None,
    config: PretrainedConfig | None = None,
) -> list[dict[str, list[int]]]:
    """Rows as a `Trainer` with `DataCollatorForSeq2Seq` takes them: `input_ids` and `labels`.

    A row is one of
    - a text, or a dict with `text`: every token but the first counts,
    - a `Row`, or a dict with `prompt` and `answer` or `completion`: the answer and one
      end-of-sequence token count, as in agcl's own runs,
    - a dict with `messages`, and perhaps `tools`: the assistant's turns count, rendered by the
      tokenizer's chat template,
    - a dict with `input_ids`, as of a tokenized dataset: tokens count where `labels` are not -100,
      or where `completion_mask` and `assistant_masks` are 1; without any of them all do.

    Tokens after `max_tokens` are cut off. A text starts with BOS, for some tokenizers that of the
    model's `config` (`own_text.start_token`). Raises `ValueError` naming the row for any other
    kind, and for labels that are not the row's own tokens.
    """
    return [
        {key: ids[:max_tokens] for key, ids in _tokenized(tokenizer, row, number, config).items()}
        for number, row in enumerate(rows)
    ]


def attribute_dataset(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Any],
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    correct_only: bool | None = None,
    **options: Any,
) -> Importance:
    """The importance of what `rows` ask for: a list, or a `datasets.Dataset`.

    For the kinds of rows see `tokenize_rows`; `max_tokens` is at most the model's positions. Rows
    that keep no token that counts are left out. `correct_only` attributes only rows that the model
    answers exactly; by default this is so if all rows have a prompt and an answer as text, since
    a long text is rarely reproduced exactly. `options` are those of `attribute`, which by default
    collects moments of all tokens alike and no entries: what `bases` needs, in one forward pass.
    For an energy above 0.95 pass `keep=1`.
    `log=` is called with the number of rows done.

    The model runs on its own device, in eval mode, and is left as it was; wrappers (DDP, PEFT,
    `torch.compile`) are looked through. In a process group every rank passes the same rows and
    attributes its share. Raises `ValueError` for rows of another kind, without rows, and as
    `attribute` does.
    """
    inner = unwrapped(model)
    rows = list(rows)
    if correct_only is None:
        correct_only = all(_has_answer(row) for row in rows)
    positions = inner.config.max_position_embeddings
    most = min(max_tokens or positions, positions)
    tokenized = tokenize_rows(tokenizer, rows, max_tokens=most, config=inner.config)
    counted = [row for row in tokenized if set(row["labels"][1:]) - {IGNORED}]
    if not counted:
        raise ValueError(f"none of the {len(rows)} rows has a token to attribute")
    indices = by_length([len(row["input_ids"]) for row in counted], batch_size)
    own = indices[distributed.rank() :: distributed.world_size()]
    batches = (_batch([counted[i] for i in batch]) for batch in own)
    settings = {"moments": "uniform", "entries": False, **options}
    return attribute(inner, batches, correct_only=correct_only, **settings)


def protect_base(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    energy: float = 0.7,
    samples: int = 96,
    tokens: int = 64,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[str, torch.Tensor]:
    """Input directions that carry what a model knows, from text that it writes itself.

    `samples` texts of `tokens` tokens, see `own_texts`; `energy` is that of `bases`. Call it
    before an adapter is added. A later task's are `bases([importance], energy=..., known=basis)`.
    Raises `ValueError` for a model in half precision.
    """
    inner = unwrapped(model)
    check_precision(inner)  # Before the texts are written, which takes longest.
    texts = own_texts(inner, tokenizer, samples=samples, tokens=tokens, seed=seed)
    own = in_order(len(texts), batch_size)[distributed.rank() :: distributed.world_size()]
    importance = attribute(
        inner,
        (collate([texts[i] for i in batch]) for batch in own),
        moments="uniform",
        entries=False,
        correct_only=False,
        keep=1,  # Any energy can be asked for, and nothing is stored.
    )
    return bases([importance], energy=energy, device=inner.device)


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, row: Any, number: int, config: PretrainedConfig | None
) -> dict[str, list[int]]:
    if isinstance(row, Mapping) and "input_ids" in row:
        ids = [int(token) for token in row["input_ids"]]  # A dataset may give tensors.
        labels = _labels(row, ids)
        if len(labels) != len(ids) or any(
            label not in (IGNORED, token) for label, token in zip(labels, ids, strict=True)
        ):
            raise ValueError(f"row {number}: its labels are not its input_ids, or {IGNORED}")
        return {"input_ids": ids, "labels": labels}
    text = row.get("text") if isinstance(row, Mapping) else row
    if isinstance(text, str):
        start = start_token(tokenizer, config)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids if ids[:1] == [start] else [start, *ids]  # A rendered conversation has its BOS.
        return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}
    if _has_answer(row) or _is_conversation(row):
        as_row = _as_row(row, number)
        if as_row.conversation and is_empty(as_row):  # Runs leave it out; it cannot be rendered.
            raise ValueError(f"row {number}: the last assistant turn, or all before it, is blank")
        (found,) = encoded_rows(encode(tokenizer, [as_row]))
        labels = [IGNORED] * len(found.input_ids)
        for start, stop in found.spans:
            labels[start:stop] = found.input_ids[start:stop]
        return {"input_ids": found.input_ids, "labels": labels}
    content = sorted(row) if isinstance(row, Mapping) else type(row).__name__
    raise ValueError(f"row {number} ({content}) is not {_KINDS}")


def _labels(row: Mapping[str, Any], ids: list[int]) -> list[int]:
    if row.get("labels") is not None:
        return [int(label) for label in row["labels"]]
    masks = [row[name] for name in _MASKS if row.get(name) is not None]
    if not masks:
        return ids
    return [token if all(marks) else IGNORED for token, *marks in zip(ids, *masks, strict=True)]


def _has_answer(row: Any) -> bool:
    if isinstance(row, Row):
        return True
    if not isinstance(row, Mapping) or "input_ids" in row or not isinstance(row.get("prompt"), str):
        return False
    return any(isinstance(row.get(key), str) for key in _ANSWERS)


def _is_conversation(row: Any) -> bool:
    return isinstance(row, Mapping) and "messages" in row


def _as_row(row: Any, number: int) -> Row:
    if isinstance(row, Row):
        return row
    if _is_conversation(row):
        return LAYOUTS["messages"](row, f"row {number}")
    return Row(row["prompt"], next(row[key] for key in _ANSWERS if isinstance(row.get(key), str)))


def _batch(rows: Sequence[Mapping[str, list[int]]]) -> Batch:
    """Pad rows to the longest row."""
    ids, labels = (
        pad_sequence([torch.tensor(row[key]) for row in rows], True, padding)
        for key, padding in (("input_ids", 0), ("labels", IGNORED))
    )
    return Batch(ids, labels, torch.tensor([len(row["input_ids"]) for row in rows]))
