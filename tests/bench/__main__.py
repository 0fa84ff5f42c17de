"""`PYTHONPATH=tests python -m bench`: what attribution, protection and the pipeline cost.

Every figure is a ratio of two things done in turn, the median over pairs, with the quartiles. A
sweep measures seconds at several values of one thing. Without names: all figures, no sweep.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
from transformers.utils import logging

from agcl.errors import InputError
from agcl.model.builtin import BUILTIN
from agcl.model.forward import Precision
from bench import figures, peaks, steps, sweeps, two_tasks, whole
from bench.measure import Figure, Setting, prepared_rows, random_rows
from bench.shapes import SHAPES, loaded

SINGLE = {
    "attribute": figures.attribution_against_training,
    "moments": figures.moments_against_training,
    "uniform": figures.uniform_against_forward,
    "decompose": figures.decomposition,
    "artifact": figures.artifact,
    "attribute_loop": figures.attribution_against_a_loop,
    "gated_step": steps.gated_step,
    "projected_step": steps.projected_step,
    "packed_step": steps.packed_step,
    "compiled_step": steps.compiled_step,
    "trainer": steps.trainer,
    "trainer_packed": steps.trainer_packed,
    "exact_match": figures.exact_match_against_generate,
    "memory_train": peaks.train,
    "memory_attribute": peaks.attribution,
    "memory_evaluate": peaks.evaluation,
}
WITHOUT_A_MODEL = ("pipeline", "task_30", "two_tasks")
"""Figures that load their model themselves."""
NAMES = [*SINGLE, *WITHOUT_A_MODEL]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 0 also where a bar is missed, 1 without memory, 2 for a bad argument."""
    given = _parsed(arguments)
    try:
        return _measure_all(given)
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _measure_all(given: argparse.Namespace) -> int:
    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    found: list[Figure] = []
    points: dict[str, dict[int, sweeps.Point]] = {}

    def write() -> None:
        measured = {"figures": [asdict(one) for one in found], "sweeps": points}
        if given.json:
            given.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")

    names = given.figures or ([] if given.sweep else NAMES)
    setting = None
    if given.sweep or not {*names} <= {*WITHOUT_A_MODEL}:
        setting = _setting(given)
    for name in names:
        found += _measured(name, setting, given)
        write()
    for name in given.sweep:
        points[name] = sweeps.SWEEPS[name](setting)
        _print_sweep(name, points[name])
    write()
    return 0


def _setting(given: argparse.Namespace) -> Setting:
    rows = (
        prepared_rows(given.rows_of, given.rows)
        if given.rows_of
        else random_rows(given.rows, given.tokens)
    )
    model = loaded(given.model, given.device, getattr(torch, given.dtype))
    setting = Setting(model, rows, given.pairs, given.batches, given.precision)
    print(
        f"{given.model}: {setting.num_weights / 1e6:.1f}M parameters in {given.dtype}, "
        f"{len(rows)} rows of at most {max(len(row.input_ids) for row in rows)} tokens, "
        f"{given.device}, {given.precision}, {given.threads} threads, {given.pairs} pairs"
    )
    return setting


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figures", nargs="*", help=f"some of {', '.join(NAMES)}")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        choices=[*sweeps.SWEEPS],
        help="how costs grow with this; may be given several times",
    )
    parser.add_argument(
        "--model",
        default=BUILTIN,
        help=f"model folder, or random weights: {', '.join(SHAPES)} (default: builtin)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=get_args(Precision),
        help="of passes; bfloat16 means autocast (default: float32)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=get_args(Precision),
        help="of the weights (default: float32)",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--pairs", type=int, default=7, help="measurements (default: 7)")
    parser.add_argument("--rows", type=int, default=8, help="rows a batch (default: 8)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens a row (default: 24)")
    parser.add_argument(
        "--batches",
        type=int,
        default=4,
        help="batches an attribution; a task of 96 rows has 12 of 8 (default: 4)",
    )
    parser.add_argument(
        "--rows-of", type=Path, help="a prepare stage's .arrow file to take the rows from instead"
    )
    parser.add_argument("--json", type=Path, help="file for what was measured, as JSON")
    given = parser.parse_args(arguments)
    if unknown := set(given.figures) - set(NAMES):
        parser.error(f"no figure {', '.join(sorted(unknown))}")
    return given


def _measured(name: str, setting: Setting | None, given: argparse.Namespace) -> list[Figure]:
    match name:
        case "pipeline":
            found = [whole.whole_pipeline(given.model, given.pairs, given.threads, given.device)]
        case "task_30":
            found = whole.late_task(given.pairs, given.threads, given.device)
        case "two_tasks":
            sizes = (given.rows, given.tokens)
            found = [two_tasks.two_tasks(given.model, given.device, given.precision, *sizes)]
        case _:
            found = [SINGLE[name](setting)]
    for one in found:
        verdict = "ok" if one.median <= one.bar else "missed"
        print(
            f"{one.name:16} {one.median:6.3f} [{one.low:.3f}, {one.high:.3f}] of {one.against} "
            f"(bar {one.bar}: {verdict}; {one.values[0]:.3f} / {one.values[1]:.3f} {one.unit}"
            f"{one.note and '; '}{one.note})",
            flush=True,
        )
    return found


def _print_sweep(name: str, points: dict[int, sweeps.Point]) -> None:
    for value, point in points.items():
        taken = "  ".join(f"{what} {seconds:.4f} s" for what, seconds in point.items())
        print(f"{name:10} {value:5}  {taken}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
