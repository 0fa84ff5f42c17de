"""Multiple-choice probes of a model's general skills, scored as lm-evaluation-harness does.

What `acc` and `acc_norm` of its multiple-choice tasks measure (Gao et al. 2024,
https://github.com/EleutherAI/lm-evaluation-harness), without examples before the question.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agcl.errors import InputError
from agcl.model.forward import Precision, autocast, head_at
from agcl.parallel import distributed
from agcl.tasks import records
from agcl.tasks.batches import by_length

_SOFTMAX_TOKENS = 128
"""Tokens whose chances are held in float32 at a time, over the whole vocabulary."""


class Question(NamedTuple):
    """A context, what may follow it, and the index of the right choice."""

    context: str
    choices: list[str]
    answer: int


class Scored(NamedTuple):
    """The choices' log-likelihoods, in nats, and the index of the one a model chooses."""

    log_likelihoods: list[float]
    by_sum: int
    """The highest log-likelihood; right in a share `acc` of the questions."""
    by_length: int
    """The highest log-likelihood per character; right in a share `acc_norm`."""


def read(file: Path) -> list[Question]:
    """The questions of a JSON Lines file: `{"context": ..., "choices": [...], "answer": index}`.

    Raises `InputError` naming file and line.
    """
    questions = [_question(place, record) for place, record in records.read(file, "jsonl")]
    if not questions:
        raise InputError(f"{file}: no question")
    return questions


def _question(place: str, record: Mapping[str, Any]) -> Question:
    context, answer = (records.text(record, key, place) for key in ("context", "answer"))
    choices = record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"{place}: 'choices' must be a list of at least two texts")
    texts = [records.text({"choices": choice}, "choices", place) for choice in choices]
    if not all(text.strip() for text in texts):
        raise InputError(f"{place}: a choice is empty")
    if not (answer.isdecimal() and int(answer) < len(texts)):
        raise InputError(f"{place}: 'answer' must be an index, 0 to {len(texts) - 1}, not {answer}")
    return Question(context, texts, int(answer))


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int,
    precision: Precision = "float32",
    log: Callable[[int], None] = lambda questions_done: None,
) -> list[Scored]:
    """The log-likelihood of every choice, and the two that the model chooses.

    About `batch_size` choices share a forward pass; a question's context is computed once for all
    of them. Batches do not depend on the number of ranks. Contexts are truncated on the left to the
    model's positions. Collective: same result on every rank. Raises `InputError` for a choice
    without tokens, or with more than the model has positions.
    """
    # By question and context: choices of different lengths truncate a long context differently.
    shared: dict[tuple[int, tuple[int, ...]], list[tuple[int, list[int]]]] = {}
    for number, question in enumerate(questions):
        pairs = _encode(tokenizer, question, model.config.max_position_embeddings)
        for choice, (context, continuation) in enumerate(pairs):
            shared.setdefault((number, tuple(context)), []).append((choice, continuation))
    groups = list(shared.items())
    most = max((len(question.choices) for question in questions), default=1)
    # By the longest choice, which is padded once per choice, then by context.
    lengths = [max(len(ids) for _, ids in options) for options in shared.values()]
    order = [
        length * 2**24 + len(ids) for length, ((_, ids), _) in zip(lengths, groups, strict=True)
    ]
    found = torch.zeros(len(questions), most, dtype=torch.float64, device=model.device)
    was_training = model.training
    model.eval()
    batches = by_length(order, max(1, batch_size // most))
    for number, counts in distributed.in_turn(len(batches)):
        batch = [groups[i] for i in batches[number]]
        contexts = [list(context) for (_, context), _ in batch]
        options = [[continuation for _, continuation in options] for _, options in batch]
        with autocast(model.device, precision):
            likelihoods = _log_likelihoods(model, contexts, options)
        if counts:
            places = [(question, choice) for (question, _), each in batch for choice, _ in each]
            rows, columns = zip(*places, strict=True)
            found[list(rows), list(columns)] = likelihoods
        log(len(questions) * (number + 1) // len(batches))
    model.train(was_training)
    distributed.sum_in_place([found])
    scored = []
    for question, values in zip(questions, found.tolist(), strict=True):
        of_choices = values[: len(question.choices)]
        per_character = np.divide(of_choices, [len(choice) for choice in question.choices])
        scored.append(Scored(of_choices, int(np.argmax(of_choices)), int(np.argmax(per_character))))
    return scored


def _encode(
    tokenizer: PreTrainedTokenizerBase, question: Question, positions: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids of context and continuation per choice, as lm-eval's `HFLM` makes them.

    A continuation is the context's trailing white space, a space and the choice. Its tokens are
    those of the whole text, minus the first n if the context alone has n tokens.
    """
    context = question.context.rstrip()
    space = question.context[len(context) :] + " "
    prefix = tokenizer.bos_token_id
    if prefix is None:
        prefix = tokenizer.eos_token_id
    texts = [context + space + choice for choice in question.choices]
    if context:
        # A context may hold the tokenizer's BOS already.
        special = not context.startswith(tokenizer.decode(prefix))
        alone, *whole = tokenizer([context, *texts], add_special_tokens=special)["input_ids"]
    else:
        alone = [prefix]
        whole = [[prefix, *ids] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    pairs = []
    for choice, ids in zip(question.choices, whole, strict=True):
        continuation = ids[len(alone) :]
        if not 0 < len(continuation) <= positions:
            raise InputError(
                f"choice {choice[:50]!r} of the question {context[:50]!r} has {len(continuation)} "
                f"tokens; the model needs 1 to {positions}"
            )
        # The last token is predicted, not read.
        pairs.append((alone[-(positions + 1 - len(continuation)) :], continuation))
    return pairs


def _log_likelihoods(
    model: PreTrainedModel, contexts: list[list[int]], options: list[list[list[int]]]
) -> Tensor:
    """The log-likelihood of every option of every context, (options of all contexts,) float64."""
    # A context's last token is read again with every option, whose first token it predicts. So the
    # first pass needs no logits, and both passes always run: a sharded model's are collective.
    ids, mask = _padded([context[:-1] for context in contexts], left=True, like=model)
    output = model(
        ids,
        attention_mask=mask,
        position_ids=_positions(mask),
        use_cache=True,
        logits_to_keep=1,
    )
    pairs = [(i, option) for i, of_context in enumerate(options) for option in of_context]
    owners = torch.tensor([i for i, _ in pairs], device=model.device)
    output.past_key_values.batch_select_indices(owners)
    read = [[contexts[i][-1], *option[:-1]] for i, option in pairs]
    ids, tokens = _padded(read, left=False, like=model)
    seen = torch.cat([mask[owners], tokens], dim=1)
    with head_at(model, tokens.bool()):
        output = model(
            ids,
            attention_mask=seen,
            position_ids=_positions(seen)[:, mask.shape[1] :],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    expected = torch.tensor([token for _, option in pairs for token in option], device=ids.device)
    parts = zip(
        output.logits[0].split(_SOFTMAX_TOKENS), expected.split(_SOFTMAX_TOKENS), strict=True
    )
    losses = [cross_entropy(logits.float(), ids, reduction="none") for logits, ids in parts]
    total = torch.zeros(len(pairs), dtype=torch.float64, device=ids.device)
    return -total.index_add(0, tokens.nonzero()[:, 0], torch.cat(losses).double())


def _padded(rows: list[list[int]], *, left: bool, like: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids and mask of rows padded to the longest, at least one token, (rows, tokens)."""
    width = max(1, *map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [pad + one if left else one + pad for one, pad in zip(ones, pads, strict=True)]
    return torch.tensor(ids, device=like.device), torch.tensor(mask, device=like.device)


def _positions(mask: Tensor) -> Tensor:
    """Each token's position among those of its row; padding has one that the model knows."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
