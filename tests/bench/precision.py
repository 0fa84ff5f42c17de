"""`PYTHONPATH=tests python -m bench.precision`: attribution in bfloat16 beside float32, in a table.

Directions: how much of those that hold 0.8 of a moment in float32 lies in as many of the other, the
mean squared cosine of their principal angles. Entries: the share of the top 1 % in common.
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedModel
from transformers.utils import logging

from agcl.attribution import attribute
from agcl.importance import Importance, overlap
from agcl.importance.moment import leading
from agcl.model import models
from agcl.tasks.batches import collate, in_order
from bench.measure import prepared_rows, random_rows

_ENERGY = 0.8


def shared_directions(one: Importance, other: Importance) -> dict[str, list[float]]:
    """By kind of input: of every layer, the share of directions in common."""
    found: dict[str, list[float]] = {}
    for name, moment in one.moments.items():
        expected = leading(moment, _ENERGY)
        given = other.moments[name].directions[:, : expected.shape[1]]
        share = float((expected.T @ given).square().sum()) / max(1, expected.shape[1])
        found.setdefault(name.split(".")[-2], []).append(share)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Attribute rows four times and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows-of", type=Path, help="prepared rows, train.arrow (default: random)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()
    file, number = given.rows_of, given.rows
    rows = prepared_rows(file, number) if file else random_rows(number, 24)
    model, half = (
        models.load_model(given.model, dtype=dtype).to(given.device)
        for dtype in ("float32", "bfloat16")
    )

    def importance(model: PreTrainedModel, precision: str, size: int) -> Importance:
        batches = [collate([rows[i] for i in b]) for b in in_order(len(rows), size)]
        options = {"moments": "relevance", "correct_only": False, "precision": precision}
        return attribute(model, batches, **options)  # type: ignore[arg-type]

    exact = importance(model, "float32", 8)
    print(f"| {len(rows)} rows | directions of each input: mean (worst layer) | top entries |")
    print("| --- | --- | --- |")
    for said, attributed, precision, size in (
        ("float32, other batches", model, "float32", 5),
        ("bfloat16", model, "bfloat16", 8),
        ("bfloat16, and bfloat16 weights", half, "bfloat16", 8),
    ):
        other = importance(attributed, precision, size)
        shares = [
            f"{kind} {fmean(values):.4f} ({min(values):.4f})"
            for kind, values in shared_directions(exact, other).items()
        ]
        common = overlap([exact, other])[0][1]
        print(f"| {said} | {', '.join(shares)} | {common:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
