"""Evaluate: score a model on every evaluation set of every task, one row of the accuracy matrix."""

import json
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from agcl.model import models
from agcl.scoring.evaluate import predict
from agcl.scoring.generate import generate
from agcl.scoring.scorers import TEACHER_FORCED, score, scorer_named
from agcl.tasks import VALIDATION, EncodedRows
from agcl.tasks.chat_template import template_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.stages.base_knowledge import measure
from pipeline.stages.check_saved import ANSWERS, Verdict, check_answers, check_tokens
from pipeline.stages.context import Context
from pipeline.stages.files import PREDICTIONS, SAVED, SCORES, SUMMARY, named, rows_file
from pipeline.storage.artifact import write_json


def evaluate(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Score `model`, with the input `adapter` on it if there is one.

    `scores.json` holds the mean score per task (inputs `rows/<task>`) and evaluation set. Each set
    is scored by its task's scorer, and by each of the config's `scorers` as an additional set
    `<set>-<scorer>`; of several references the best counts. `predictions.parquet` holds one line
    per scored row and scorer, enough to recompute every metric; `predicted` is the model's greedy
    answer, cut after its first wrong token if exact match is the only scorer. With a `validation`
    share, only validation rows are scored: the task's validation split or, without one, the rows
    whose `position` is below the share. `base.json` holds how much of the base model's knowledge is
    left (`base_knowledge.measure`). The config's `task_scorers` are pairs of a task and its scorer;
    its `facts` names the base model's facts among the tasks, or is None.

    Also checks the saved folder: its tokenizer must give a few rows the same tokens. With `saved`,
    the model is reloaded from its files to answer a few rows, and `saved.json` holds how many
    answers agree. A sharded model is not reloaded, since it may not fit on one worker. Raises
    `ValueError` if a check fails.
    """
    scores: dict[str, dict[str, float]] = {}
    tables: list[pa.Table] = []
    verdicts: list[list[Verdict]] = []
    tasks = named("rows/", inputs)
    with context.borrowed_model(inputs, config) as model:
        tokenizer = models.load_tokenizer(inputs.get("adapter", inputs["model"]))
        for number, (task, folder) in enumerate(tasks.items(), start=1):
            scores[task], verdict = _score_task(model, tokenizer, config, task, folder, tables)
            verdicts.append(verdict)
            context.log({f"{name}/{task}": value for name, value in scores[task].items()}, number)
        _check_common({task: scores[task] for task in tasks if task != config["facts"]})
        measure(model, tokenizer, config, inputs, out_dir, context)
    if context.is_rank_zero:
        pq.write_table(pa.concat_tables(tables), out_dir / PREDICTIONS)
        write_json(out_dir / SCORES, scores)
        if config["saved"]:
            found: dict[str, Any] = {"skipped": "the model is sharded"}
            if not context.shard_model:
                del model  # No later stage needs it, and two models may not fit.
                context.held.clear()
                found = check_answers(inputs, tokenizer, verdicts, config, context)
            write_json(out_dir / SAVED, found)


def _score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Mapping[str, Any],
    task: str,
    folder: Path,
    tables: list[pa.Table],
) -> tuple[dict[str, float], list[Verdict]]:
    """Score one task and append its predictions to `tables`.

    Returns the mean score per evaluation set, and a few rows with their verdicts, rows that the
    model answered exactly first.
    """
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    scorer_of_task = dict(config["task_scorers"])[task]
    scores: dict[str, float] = {}
    verdicts: list[Verdict] = []
    for name, rows in _rows_to_score(folder, summary, config["validation"]).items():
        if not len(rows):
            raise ValueError(
                f"evaluation.validation: {config['validation']} leaves no validation row in {name} "
                f"of task {task}; choose another share"
            )
        check_tokens(tokenizer, rows, task)
        sets = {name: scorer_of_task}
        sets |= {f"{name}-{s.rpartition(':')[2]}": s for s in config["scorers"]}
        texts, expected, exact = _answers(model, tokenizer, rows, config, set(sets.values()))
        right_first = sorted(range(len(rows)), key=lambda i: not exact[i])[:ANSWERS]
        verdicts += [(rows[i], exact[i]) for i in right_first]
        answers = _without_lead(tokenizer, rows, rows.table["answer"].to_pylist())
        for set_name, scorer in sets.items():
            scored = _scored(scorer, texts, expected, rows.table, exact)
            scores[set_name] = fmean(scored)
            tables.append(_predictions(task, set_name, scorer, texts, answers, rows.table, scored))
    return scores, sorted(verdicts, key=itemgetter(1), reverse=True)


def _check_common(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Raise `ValueError` if the tasks have no evaluation set in common, and so no matrix."""
    if not set.intersection(*map(set, scores.values())):
        found = "; ".join(f"{task} has {', '.join(sets)}" for task, sets in scores.items())
        raise ValueError(
            f"the tasks have no evaluation set in common ({found}): give each a test file of rows "
            "that it is not trained on, or none of them a test file"
        )


def _rows_to_score(
    folder: Path, summary: Mapping[str, Any], validation: float | None
) -> dict[str, EncodedRows]:
    """The rows of every evaluation set; with a `validation` share, only validation rows."""
    sets = {name: EncodedRows(folder / rows_file(s)) for name, s in summary["scored"].items()}
    if validation is None:
        return sets
    if VALIDATION in sets:
        return {VALIDATION: sets[VALIDATION]}
    return {
        name: rows.where([position < validation for position in rows.table["position"].to_pylist()])
        for name, rows in sets.items()
    }


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: EncodedRows,
    config: Mapping[str, Any],
    scorers: set[str],
) -> tuple[list[str], list[str], list[bool]]:
    """For every row the model's answer, the expected one, and whether they agree exactly.

    One teacher-forced pass finds the exact answers. The others are decoded token by token, or cut
    after their first wrong token if every scorer is exact match. Both texts are decoded without
    special tokens, except those that occur in an expected answer (labels may be special tokens),
    and without what the chat template writes before an answer, such as an empty `<think>` block.
    An answer ends with the end-of-sequence token or the chat template's end token.
    """
    options = {"batch_size": config["batch_size"], "precision": config["precision"]}
    predicted = predict(model, rows, **options)
    encoded = [rows[i] for i in range(len(rows))]
    exact = [
        ids == row.input_ids[row.prompt_tokens :]
        for ids, row in zip(predicted, encoded, strict=True)
    ]
    wrong = [i for i, right in enumerate(exact) if not right]
    ends = {tokenizer.eos_token_id, *(row.input_ids[-1] for row in encoded)}
    if scorers != {TEACHER_FORCED} and wrong:
        longest = max(len(row.input_ids) - row.prompt_tokens for row in encoded)
        decoded = generate(
            model,
            [encoded[i].input_ids[: encoded[i].prompt_tokens] for i in wrong],
            end=sorted(ends),
            max_new_tokens=config["max_new_tokens"] or longest,
            **options,
        )
        for i, ids in zip(wrong, decoded, strict=True):
            predicted[i] = ids
    else:
        for i in wrong:
            # Behind its first wrong token the model was shown the expected answer, not its own.
            tokens = zip(
                predicted[i], encoded[i].input_ids[encoded[i].prompt_tokens :], strict=True
            )
            first = next(n for n, (said, right) in enumerate(tokens) if said != right)
            predicted[i] = predicted[i][: first + 1]
    answers = [row.input_ids[row.prompt_tokens : -1] for row in encoded]
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(token for token, each in added if each.special)}
    skipped = special.difference(*answers) | ends
    texts, expected = (
        tokenizer.batch_decode([[i for i in ids if i not in skipped] for ids in each])
        for each in (predicted, answers)
    )
    texts, expected = (_without_lead(tokenizer, rows, each) for each in (texts, expected))
    return texts, expected, exact


def _without_lead(
    tokenizer: PreTrainedTokenizerBase, rows: EncodedRows, texts: list[str]
) -> list[str]:
    """Answers without what the chat template writes before their words, if the rows have one."""
    of_chat = rows.table["earlier"].null_count < len(rows)
    lead = template_of(tokenizer).lead.strip() if of_chat else ""
    return [text.lstrip().removeprefix(lead).lstrip() for text in texts] if lead else texts


def _scored(
    name: str,
    texts: Sequence[str],
    expected: Sequence[str],
    rows: pa.Table,
    exact: Sequence[bool],
) -> list[float]:
    """The score of every row, the best over its references.

    Raises `ValueError` for a score that is not a number in [0, 1].
    """
    if name == TEACHER_FORCED:
        return [float(right) for right in exact]
    scorer = scorer_named(name)
    questions = pc.coalesce(rows["question"], rows["prompt"]).to_pylist()
    columns = questions, rows["references"].to_pylist()
    scored = [
        max(score(scorer, text, each, question) for each in (reference, *(others or ())))
        for text, reference, question, others in zip(texts, expected, *columns, strict=True)
    ]
    for row, value in enumerate(scored):
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ValueError(f"scorer {name} gives {value} for row {row}, not a number in [0, 1]")
    return scored


def _predictions(
    task: str,
    name: str,
    scorer: str,
    texts: list[str],
    answers: list[str],
    rows: pa.Table,
    scored: list[float],
) -> pa.Table:
    return pa.table(
        {
            "task": [task] * len(texts),
            "evaluation_set": [name] * len(texts),
            "row": range(len(texts)),
            "prompt": rows["prompt"],
            "answer": answers,
            "references": rows["references"],
            "predicted": texts,
            "scorer": [scorer] * len(texts),
            "score": scored,
            "position": rows["position"],
        }
    )
