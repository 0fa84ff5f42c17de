import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from agcl.metrics import summary
from jobs.execution import print_comparison
from pipeline.results.figures import figures
from pipeline.results.report import METRICS, write_report
from pipeline.results.results import RunResult, StageRecord, groups, labels, left_out

TASKS = ["harbour", "valley", "island"]
FEW = {"importance": False, "held_out": False, "sets": ["memorization"]}  # few figures: fast


def matrix(num_tasks, kept, learned=1.0):
    rows = [[0.0] * num_tasks for _ in range(num_tasks + 1)]
    for task in range(num_tasks):
        for row in range(task + 1, num_tasks + 1):
            rows[row][task] = learned if row == task + 1 else kept
    return rows


def run(
    method="agcl",
    *,
    tasks=TASKS,
    seed=0,
    kept=0.7,
    importance=True,
    held_out=True,
    sets=("memorization", "generalization"),
    **changes,
):
    sets = {
        name: summary(matrix(len(tasks), kept / i, 1.25 / (i + 0.25)))
        for i, name in enumerate(sets, 1)
    }
    layers = {"self_attn.q_proj": [1.0, 2.0], "mlp.up_proj": [0.0, 4.0]}
    overlap = 0.05 + 0.95 * np.eye(len(tasks))
    values = {
        "metrics": {
            "name": "facts",
            "method": method,
            "seed": seed,
            "tasks": tasks,
            "evaluation_set": "memorization",
            **sets["memorization"],
            "evaluation_sets": sets,
            "held_out": {"base": [0.5] * (len(tasks) + 1)} if held_out else {},
        },
        "config_yaml": f"name: facts\nseed: {seed}\n",
        "stages": [
            StageRecord("prepare/harbour", "0123456789abcdef", 1.5, True),
            StageRecord("train/1", "fedcba9876543210", 12.25, False),
        ],
        "importance": {
            "tasks": tasks,
            "by_layer_and_module": [layers] * len(tasks),
            "overlap": overlap.tolist(),
            "rows_attributed": [24] * len(tasks),
        }
        if importance
        else None,
        "provenance": {"git": "6da8cc3", "command": f"agcl run facts.yaml method={method}"},
    }
    return RunResult(**{**values, **changes})


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text, and tables as lists of rows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.tables, self.in_cell = [], "", [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True
        elif tag == "strong":
            self.tables[-1][-1][-1] += "*"

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data.strip()

    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


@pytest.fixture
def page(tmp_path):
    def write(*runs, title="facts"):
        file = tmp_path / "report.html"
        write_report(file, runs, title=title)
        assert [each.name for each in tmp_path.iterdir()] == ["report.html"]  # no .part left
        return Page(file.read_text(encoding="utf-8"))

    return write


@pytest.fixture(scope="module")
def pair():
    return [run("agcl", kept=0.7), run("sequential", kept=0.4, importance=False)]


@pytest.fixture(scope="module")
def pair_text(pair, tmp_path_factory):
    file = tmp_path_factory.mktemp("pair") / "report.html"
    write_report(file, pair, title="facts")
    return file.read_text(encoding="utf-8")


def shown(value):
    return "–" if value is None else f"{value:.3f}"


def of_set(metrics, name):
    values = metrics["evaluation_sets"][name]
    return [values[key]["mean"] if key == "forgetting" else values[key] for key in METRICS]


def test_headline_states_what_each_method_keeps_best_first(page):
    four = {"tasks": [*TASKS, "mountain"], **FEW}
    seen = page(run("sequential", kept=0.4, **four), run("agcl", kept=0.6, **four))
    assert (
        "agcl keeps 0.70 of 1.00 learned after 4 tasks (backward transfer -0.40); "
        "sequential keeps 0.55 (-0.60)."
    ) in seen.text


@pytest.mark.parametrize(("index", "name"), [(0, "memorization"), (1, "generalization")])
def test_metrics_table_equals_the_data_and_marks_the_best(pair, pair_text, index, name):
    agcl, sequential = pair
    header, first, second = Page(pair_text).tables[index]
    assert header[0] == "Method"
    assert [cell.strip("*") for cell in first] == ["agcl", *map(shown, of_set(agcl.metrics, name))]
    assert second == ["sequential", *map(shown, of_set(sequential.metrics, name))]
    marked = {key for key, cell in zip(METRICS, first[1:], strict=True) if cell.startswith("*")}
    # both learned the same and neither transferred forward: no best there
    assert marked == set(METRICS) - {"learning_accuracy", "forward_transfer"}


def test_seeds_of_a_method_are_averaged_and_listed(page):
    runs = [run("agcl", seed=s, kept=k, **FEW) for s, k in enumerate([0.6, 0.8])]
    runs.append(run("sequential", **FEW))
    assert labels(runs) == ["agcl seed 0", "agcl seed 1", "sequential"]
    means, seeds, *_ = page(*runs).tables
    rows = {row[0]: row[1] for row in means}
    # (0.7333 + 0.8667) / 2, and t(0.975, 1) * 0.0667
    assert rows["agclmean of 2 seeds"].strip("*") == "0.800± 0.847"
    assert rows["sequential"].strip("*") == "0.800"
    assert {row[0]: row[1] for row in seeds[1:]} == {
        "agcl seed 0": "0.733",
        "agcl seed 1": "0.867",
        "sequential": "0.800",
    }


def test_differences_are_paired_by_seed(page):
    kept = {"sequential": [0.1, 0.4], "agcl": [0.25, 0.7], "project_uniform": [0.25, 0.4]}
    runs = [
        run(method, seed=seed, kept=k, **FEW)
        for method in kept
        for seed, k in enumerate(kept[method])
    ]
    table = next(t for t in page(*runs).tables if t[0][1] == "sequential")
    rows = {row[0]: row[1:3] for row in table[1:]}
    # Two of three tasks have the score `kept`: 0.1 and 0.2 gained over sequential.
    assert rows["agcl"] == ["0.150± 0.635", "project_uniform 0.100± 1.271"]
    assert rows["sequential"] == ["–", "–"]


def test_losses_on_text_are_averaged_over_seeds(page):
    runs = [run(seed=seed, **FEW) for seed in (0, 1)]
    for number, each in enumerate(runs):
        each.metrics["text_loss"] = [1.0, 2.0, 3.0, 4.0 + number]
    rows = next(t for t in page(*runs).tables if t[0][1] == "base" and t[0][0] == "Method")
    assert rows[1] == ["agcl", "1.000", "2.000", "3.000", "4.500"]


def test_self_checks_show_the_worst(page):
    checks = {
        "train/2-b": {"movement_by_decile": None, "projection_leak": 1e-6, "directions_taken": 0.1},
        "train/3-c": {"movement_by_decile": None, "projection_leak": 3e-6, "directions_taken": 0.2},
    }
    gate = {"train/2-b": {**dict.fromkeys(checks["train/2-b"]), "movement_by_decile": [2.0, 0.5]}}
    table = page(run(checks=checks, **FEW), run("gate", checks=gate, **FEW)).tables
    rows = next(t for t in table if "Leak" in t[0])
    assert rows[1:] == [["agcl", "3.0e-06", "0.200", "–"], ["gate", "–", "–", "2.00 0.50"]]


def test_rows_that_were_used_and_left_out_are_listed(page):
    counts = {"rows": 1200, "tokens": 36000, "answer_tokens": 2400, "too_long": 3, "empty": 2}
    used = run(rows={"harbour": {"train": counts}}, **FEW)
    used.metrics["scorers"] = {"harbour": "rouge_l"}
    table = next(t for t in page(used).tables if "Loss tokens" in t[0])
    assert table[1] == ["harbour", "rouge_l", "train", "1,200", "36,000", "2,400", "3", "2"]
    assert left_out(used) == [
        "harbour: of 1205 train rows left out: 3 longer than tasks.max_length, "
        "2 without prompt or answer"
    ]


def test_same_method_and_seed_twice_is_not_averaged():
    runs = [run("agcl"), run("agcl"), run("ewc")]
    assert [group.label for group in groups(runs)] == ["agcl seed 0 #1", "agcl seed 0 #2", "ewc"]


def test_accuracy_matrix_stands_in_numbers(pair_text):
    table = next(t for t in Page(pair_text).tables if t[0][0] == "after training")
    assert table[1:] == [
        ["base", "0.000", "0.000", "0.000"],
        ["harbour", "1.000", "0.000", "0.000"],
        ["valley", "0.700", "1.000", "0.000"],
        ["island", "0.700", "0.700", "1.000"],
    ]


def test_page_embeds_the_figures_and_nothing_from_outside(pair, pair_text):
    seen, drawn = Page(pair_text), figures(pair)
    assert set(drawn) == {
        "forgetting-memorization.png",
        "forgetting-generalization.png",
        "stability-plasticity-memorization.png",
        "stability-plasticity-generalization.png",
        "accuracy-agcl-memorization.png",
        "accuracy-agcl-generalization.png",
        "accuracy-sequential-memorization.png",
        "accuracy-sequential-generalization.png",
        "held-out.png",
        "importance-agcl.png",
        "overlap-agcl.png",
    }
    prefix = "data:image/png;base64,"
    embedded = [image["src"] for image in seen.images()]
    assert all(source.startswith(prefix) for source in embedded)
    found = [base64.b64decode(source.removeprefix(prefix)) for source in embedded]
    assert sorted(found) == sorted(drawn.values())
    assert all(png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 2000 for png in found)
    assert all(len(image["alt"]) > 20 for image in seen.images())
    assert not re.search(r"https?://|url\(|@import|<script|<link", pair_text)
    assert all(attributes["href"].startswith("#") for tag, attributes in seen.tags if tag == "a")


def test_names_are_shown_and_never_run(page):
    evil = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    seen = page(
        run(
            evil,
            sets=["memorization"],
            tasks=[evil, "a $x^2$ & $\\frac$", "名前"],
            config_yaml=evil,
            stages=[StageRecord(evil, evil, 1.0, False)],
            provenance={"command": evil, evil: evil},
        ),
        title=evil,
    )
    assert not any(tag == "script" for tag, _ in seen.tags)
    assert not any("onerror" in attributes for _, attributes in seen.tags)
    assert seen.text.count(evil) >= 6
    assert "名前" in seen.text


def test_settings_stages_and_provenance_are_listed(pair_text):
    seen = Page(pair_text)
    assert "name: facts\nseed: 0\n" in seen.text
    assert "agcl run facts.yaml method=sequential" in seen.text
    assert "2 stages, 12.2 s computed, 1 reused" in seen.text
    assert ["train/1", "fedcba987654", "12.2", "no"] in seen.tables[-1]
    assert ["git", "6da8cc3"] in [row for table in seen.tables for row in table]


def test_one_task_without_importance_or_held_out_skills(page):
    only = run(tasks=["only"], importance=False, held_out=False, provenance={})
    assert only.metrics["backward_transfer"] is None
    seen = page(only)
    assert "agcl scores 1.00 after 1 task." in seen.text
    assert seen.tables[0][1] == ["agcl", "1.000", "–", "1.000", "–", "1.000", "–"]
    assert "Importance" not in seen.text
    assert "Held-out" not in seen.text
    assert set(figures([only])) == {
        f"{kind}-{name}.png"
        for kind in ("accuracy-agcl", "forgetting")
        for name in ("memorization", "generalization")
    }


def test_one_task_with_importance_has_no_overlap():
    drawn = figures([run(tasks=["only"])])
    assert "importance-agcl.png" in drawn
    assert "overlap-agcl.png" not in drawn


def test_figures_of_many_runs_over_many_tasks():
    tasks = [f"a task with a long name {i}" for i in range(16)]
    runs = [
        run(m, tasks=tasks, seed=s, sets=["memorization"]) for m in ("agcl", "ewc") for s in (0, 1)
    ]
    assert all(png.startswith(b"\x89PNG") for png in figures(runs).values())


def test_importance_of_all_zeros_and_of_uneven_layers_is_drawn():
    tables = [{"c_attn": [0.0, 0.0], "lm_head": [0.0]}, {"c_attn": [1.0, 2.0, 3.0]}]
    importance = {
        "tasks": TASKS[:2],
        "by_layer_and_module": tables,
        "overlap": [[1, 0.0], [0.0, 1]],
        "rows_attributed": [0, 5],
    }
    changed = RunResult(run().metrics, "", [], importance, {})
    assert figures([changed])["importance-agcl.png"].startswith(b"\x89PNG")


def test_without_relevance_of_single_weights_the_rows_attributed_are_shown_alone(page):
    changed = run(**FEW)
    importance = {"tasks": changed.metrics["tasks"], "rows_attributed": [48, 41, 7]}
    shown = page(replace(changed, importance=importance))
    assert ["valley", "41"] in [row for table in shown.tables for row in table]
    assert not any("importance" in image["alt"] for image in shown.images())


def test_evaluation_sets_whose_names_give_one_file_name_stay_apart():
    changed = run(**FEW)
    sets = changed.metrics["evaluation_sets"]
    changed.metrics["evaluation_sets"] = {"a b": sets["memorization"], "a/b": sets["memorization"]}
    assert sum(name.startswith("accuracy") for name in figures([changed])) == 2


def test_runs_over_different_tasks_are_refused(page):
    with pytest.raises(ValueError, match="one sequence of tasks"):
        page(run(tasks=["harbour", "valley"]), run(tasks=["valley", "harbour"]))


def test_no_run_is_refused(page):
    with pytest.raises(ValueError, match="at least one run"):
        page()


def test_an_existing_report_survives_a_failure(page, tmp_path):
    page(run(**FEW))
    before = (tmp_path / "report.html").read_bytes()
    broken = run()
    del broken.metrics["evaluation_sets"]["memorization"]["accuracy_matrix"]
    with pytest.raises(KeyError):
        page(broken)
    assert (tmp_path / "report.html").read_bytes() == before


def test_the_comparison_fits_a_terminal_of_80_columns():
    methods = ("sequential", "agcl", "project_uniform", "gate_grad_x_param")
    runs = [
        run(method, seed=seed, kept=0.5 + 0.1 * seed, **FEW)
        for method in methods
        for seed in range(3)
    ]
    out = io.StringIO()
    print_comparison(Console(file=out, width=80), runs)
    lines = out.getvalue().splitlines()
    assert "…" not in out.getvalue()
    (agcl,) = (line.split() for line in lines if line.startswith(" agcl"))
    # Two of three tasks keep 0.5, 0.6, 0.7: 0.733 on average, t(0.975, 2) * sd / sqrt(3) = .166
    assert agcl == ["agcl", "0.733", "±.166", "-0.400", "1.000", "0.000", "±.000", "0.000", "±.000"]
