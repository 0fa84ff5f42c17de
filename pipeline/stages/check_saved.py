"""Checks that a saved folder, opened as a user opens it, behaves as it was trained and scored."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from agcl.model import adapter, models
from agcl.model.forward import autocast
from agcl.tasks import Encoded, EncodedRows
from agcl.tasks.encoding import Text, cut_left, encode_texts
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.stages.context import Context
from pipeline.stages.files import ADAPTER

_ROWS_PER_SET, ANSWERS = 8, 8
"""Rows of an evaluation set to tokenize again, and answers to generate again, over all tasks."""
Verdict = tuple[Encoded, bool]
"""A scored row, and whether the model was found to answer it exactly."""


def check_tokens(tokenizer: PreTrainedTokenizerBase, rows: EncodedRows, task: str) -> None:
    """Tokenize a few rows again; raise `ValueError` if `tokenizer` gives different tokens."""
    few = rows.table.slice(0, _ROWS_PER_SET).to_pylist()
    texts = []
    for row in few:
        by_template = row["earlier"] is not None
        end = tokenizer.convert_ids_to_tokens(row["input_ids"][-1]) if by_template else None
        texts.append(Text(row["prompt"], row["answer"], end))
    for number, again in enumerate(encode_texts(tokenizer, texts)):
        length = len(rows[number].input_ids)
        kept = few[number]["kept"] or 0
        encoded = cut_left(again, length, tokenizer.all_special_ids, kept) or again  # If cut.
        if encoded[:2] != rows[number][:2]:
            raise ValueError(
                f"task {task}, row {number + 1}: the rows were prepared with token ids "
                f"{rows[number].input_ids}, but the tokenizer beside the model gives "
                f"{encoded.input_ids}"
            )


def check_answers(
    inputs: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    verdicts: Sequence[Sequence[Verdict]],
    config: Mapping[str, Any],
    context: Context,
) -> dict[str, int]:
    """Answer a few rows with transformers' `generate` from the saved files; count how many agree.

    Takes rows from each task in turn, latest task first, preferring rows that were answered
    correctly; of a conversation, only the last turn. Decodes greedily, with the end tokens of the
    folder's generation config but without its penalties. Raises `ValueError` if more than an eighth
    of the verdicts differ, in bfloat16 more than half: rounding can flip a close answer.
    """
    device, loading = context.device, config["loading"]
    model = models.load_model(inputs["model"], **loading).to(device).eval()
    ends = model.generation_config.eos_token_id
    if "adapter" in inputs:  # Its folder has no generation config: the base's is not agcl's.
        adapter.load(model, inputs["adapter"] / ADAPTER).eval()
        ends = None
    in_turn = [v for turn in zip_longest(*reversed(verdicts)) for v in turn if v is not None]
    few = sorted(in_turn, key=itemgetter(1), reverse=True)[:ANSWERS]
    wrong = []
    for (ids, prompt_tokens, _), right in few:
        prompt, answer = ids[:prompt_tokens], ids[prompt_tokens:]
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=len(answer) + 1,
            eos_token_id=ends or sorted({answer[-1], tokenizer.eos_token_id}),
            pad_token_id=tokenizer.eos_token_id,
        )
        with autocast(device, config["precision"], cache=True), torch.no_grad():
            given = model.generate(torch.tensor([prompt], device=device))[0, prompt_tokens:]
        if (given.tolist() == answer) is not right:
            wrong.append((tokenizer.decode(prompt), tokenizer.decode(given)))
    if len(wrong) > len(few) // (
        2 if "bfloat16" in (config["precision"], loading["dtype"]) else ANSWERS
    ):
        raise ValueError(
            f"the model saved in {inputs.get('adapter', inputs['model'])} does not answer as it "
            f"was scored: transformers' generate() disagrees on {len(wrong)} of {len(few)} rows, "
            f"such as {wrong[0][0]!r}, answered {wrong[0][1]!r}"
        )
    return {"rows": len(few), "agree": len(few) - len(wrong)}
