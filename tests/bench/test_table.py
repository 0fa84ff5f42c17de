"""Tables that grow over days: which rows are run with what, and what is printed of them."""

import json
from pathlib import Path

import pytest
import yaml

from bench import table

PLANS = sorted((Path(__file__).parent / "tables").glob("*.yaml"))


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    for name in ("DATA", "MODEL", "TEXTS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


def line(row, seed, trained, settings=()):
    sets = {"memorization": {"average_performance": trained}}
    return {"row": row, "seed": seed, "set": [*settings], "evaluation_sets": sets, "cost": {}}


PLAN = {
    "config": "jobs/configs/facts.yaml",
    "set": ["tasks.count=2"],
    "columns": {"trained": "evaluation_sets.memorization.average_performance", "MB": "cost.mb"},
    "choose": ["trained"],
    "against": "agcl",
    "rows": {
        "agcl": None,
        "slow": {
            "method": "sequential",
            "set": ["training.epochs=3"],
            "trials": ["training.learning_rate=1e-3", "training.learning_rate=1e-4"],
        },
    },
}
RATES = [["training.learning_rate=1e-3"], ["training.learning_rate=1e-4"]]


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_every_row_of_every_plan_is_a_config(file):
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name, row in plan["rows"].items():
        for trial in (row or {}).get("trials", [""]):
            config = table.configured(plan, name, 0, trial.split())
            assert config.method == (row or {}).get("method", name)
    assert plan["against"] in plan["rows"]
    assert {*plan.get("choose", [])} <= {*plan["columns"]}


def test_trials_scored_on_validation_rows_in_place_of_a_test_set_are_told_apart():
    lines = [line("slow", table.TUNING_SEED, 0.0, rate) for rate in RATES]
    for each, score in zip(lines, (0.2, 0.3), strict=True):
        each["evaluation_sets"] = {"validation": {"average_performance": score}}
    assert table.best_trial(PLAN, "slow", lines) == RATES[1]


def test_a_rows_settings_end_with_its_trials_and_trials_see_validation_rows_only():
    config = table.configured(PLAN, "slow", 3, RATES[1])
    assert (config.method, config.seed, config.training.epochs) == ("sequential", 3, 3)
    assert (config.tasks.count, config.training.learning_rate) == (2, 1e-4)
    assert config.evaluation.rows == "all"
    trial = table.configured(PLAN, "slow", table.TUNING_SEED, RATES[1])
    assert trial.evaluation.rows == "validation"


def test_a_row_waits_for_all_its_trials_and_takes_the_best():
    assert table.best_trial(PLAN, "agcl", []) == []
    one = [line("slow", table.TUNING_SEED, 0.2, RATES[0])]
    assert table.best_trial(PLAN, "slow", one) is None
    assert table.best_trial(PLAN, "slow", [*one, line("slow", 0, 0.9, RATES[1])]) is None
    both = [*one, line("slow", table.TUNING_SEED, 0.3, RATES[1])]
    assert table.best_trial(PLAN, "slow", both) == RATES[1]


def test_means_intervals_and_paired_differences_are_printed(capsys):
    trials = [line("slow", table.TUNING_SEED, v, r) for v, r in zip((0.2, 0.3), RATES, strict=True)]
    lines = [line("agcl", seed, value) for seed, value in enumerate((0.5, 0.6, 0.7))]
    lines += [line("slow", seed, value, RATES[1]) for seed, value in enumerate((0.4, 0.4, 0.7))]
    lines += [line("slow", 0, 0.1, RATES[0])]  # Of settings that are no longer the best.
    table.print_table(PLAN, [*trials, *lines])
    printed = capsys.readouterr().out
    assert "| slow training.learning_rate=1e-4 | 1 | 0.300 | nan |" in printed
    assert "| agcl | 3 | 0.600 ±0.248 | nan ±nan |" in printed
    assert "| slow | 3 | 0.500 ±0.430 |" in printed
    assert "| slow | 3 | 0.100 ±0.248 |" in printed.partition("`agcl` minus")[2]


def test_differences_are_paired_where_both_started_from_the_same_base_model(capsys):
    plan = {
        **PLAN,
        "columns": {"trained": PLAN["columns"]["trained"]},
        "rows": {"agcl": None, "other": None, "elsewhere": None},
    }
    finished = [
        ("agcl", 0, 0.9, 0.96), ("agcl", 1, 0.8, 0.95),
        ("other", 0, 0.7, 0.96), ("other", 1, 0.7, 0.97), ("elsewhere", 0, 0.5, 0.92),
    ]  # fmt: skip
    lines = [{**line(*each[:3]), "base": {"facts": [each[3], 0.5]}} for each in finished]
    table.print_table(plan, lines)
    said = capsys.readouterr().out.partition("minus")[2]
    assert "| other | 1 | 0.200 |" in said
    assert "elsewhere" not in said


def test_finished_rows_are_read_from_the_file_beside_the_plan(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    assert table.main([str(plan)]) == 0
    lines = [line("agcl", seed, 0.5) for seed in range(2)]
    plan.with_suffix(".jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    capsys.readouterr()
    assert table.main([str(plan)]) == 0
    assert "| agcl | 2 | 0.500 ±0.000 |" in capsys.readouterr().out
