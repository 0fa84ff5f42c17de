"""`PYTHONPATH=tests python -m bench`: what attribution, protection and the pipeline cost.

Every figure is a ratio of two things done in turn, the median over pairs, with the quartiles. A
sweep measures seconds at several values of one thing. Without names: all figures, no sweep.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from agcl.errors import InputError
from agcl.model import models
from bench import figures, sweeps, whole
from bench.measure import Figure, Setting, prepared_rows, random_rows

SINGLE = {
    "attribute": figures.attribution_against_training,
    "moments": figures.moments_against_training,
    "uniform": figures.uniform_against_forward,
    "decompose": figures.decomposition,
    "attribute_loop": figures.attribution_against_a_loop,
    "gated_step": figures.gated_step,
    "projected_step": figures.projected_step,
    "packed_step": figures.packed_step,
    "compiled_step": figures.compiled_step,
    "exact_match": figures.exact_match_against_generate,
}
NAMES = [*SINGLE, "pipeline", "task_30"]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 0 also where a bar is missed, 2 for a bad argument."""
    given = _parsed(arguments)
    try:
        return _measure_all(given)
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _measure_all(given: argparse.Namespace) -> int:
    logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    rows = (
        prepared_rows(given.rows_of, given.rows)
        if given.rows_of
        else random_rows(given.rows, given.tokens)
    )
    setting = Setting(_model(given.model, given.device), rows, given.pairs, given.batches)
    size = sum(parameter.numel() for parameter in setting.model.parameters())
    print(
        f"{given.model}: {size / 1e6:.1f}M parameters, {len(rows)} rows of at most "
        f"{max(len(row.input_ids) for row in rows)} tokens, "
        f"{given.device}, {given.threads} threads, {given.pairs} pairs"
    )
    found: list[Figure] = []
    for name in given.figures or ([] if given.sweep else NAMES):
        found += _measured(name, setting, given)
    points = {}
    for name in given.sweep:
        points[name] = sweeps.SWEEPS[name](setting)
        _print_sweep(name, points[name])
    if given.json:
        measured = {"figures": [asdict(one) for one in found], "sweeps": points}
        given.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return 0


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
    parser.add_argument("--model", default=models.BUILTIN, help="model folder (default: builtin)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
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


def _measured(name: str, setting: Setting, given: argparse.Namespace) -> list[Figure]:
    match name:
        case "pipeline":
            figure, a_stage = whole.whole_pipeline(
                given.model, given.pairs, given.threads, given.device
            )
            found, note = [figure], f"; {a_stage:.2f} s a stage beyond its work"
        case "task_30":
            found, note = whole.late_task(given.pairs), ""
        case _:
            found, note = [SINGLE[name](setting)], ""
    for one in found:
        verdict = "ok" if one.median <= one.bar else "missed"
        print(
            f"{one.name:16} {one.median:6.3f} [{one.low:.3f}, {one.high:.3f}] of {one.against} "
            f"(bar {one.bar}: {verdict}; {one.values[0]:.3f} / {one.values[1]:.3f} {one.unit}"
            f"{note})",
            flush=True,
        )
    return found


def _print_sweep(name: str, points: dict[int, sweeps.Point]) -> None:
    for value, point in points.items():
        taken = "  ".join(f"{what} {seconds:.4f} s" for what, seconds in point.items())
        print(f"{name:10} {value:5}  {taken}", flush=True)


def _model(path: str, device: str) -> PreTrainedModel:
    if path == models.BUILTIN:
        return models.builtin_model(512, seed=0).to(device)
    models.check_folder(Path(path))
    return models.load_model(Path(path)).to(device)


if __name__ == "__main__":
    sys.exit(main())
