"""The report: recorded runs as they are shown, and special cases from made-up results."""

import csv
import io
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
from reference.record_run import LABELS, RECORDED, recorded
from rich.console import Console

from agcl.errors import InputError
from agcl.metrics import summary
from jobs.output import (
    print_base,
    print_base_comparison,
    print_comparison,
    print_matrices,
    print_metrics,
)
from pipeline.config.presets import METHODS
from pipeline.results import figures
from pipeline.results.checks import crowded
from pipeline.results.drawing import styles_of, svg
from pipeline.results.examples import _cut
from pipeline.results.figures import draw
from pipeline.results.report import (
    _facts,
    base_numbers,
    description,
    rewrite_report,
    write_report,
)
from pipeline.results.results import (
    METRIC_TITLES,
    RunResult,
    StageRecord,
    labels,
    left_out,
    runs_by_method,
)
from pipeline.results.run_folder import write_runs
from pipeline.search.trial import Progress, Trial
from pipeline.search.trial import table as trial_table
from pipeline.stages.metrics import _metrics

TASKS = ["harbour", "valley", "island"]
FEW = {"importance": False, "base": {}, "sets": ["memorization"]}  # few figures: fast
HOW_TO_GET_FIGURES = "importance.entries=true to get the figures of importance by layer"


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
    base=None,
    sets=("memorization", "generalization"),
    **changes,
):
    """A made-up result: every task is learned, and then a share `kept` of it is left."""
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
            "base": {"facts": [0.5] * (len(tasks) + 1)} if base is None else base,
        },
        "config_yaml": "",
        "stages": [],
        "importance": {
            "tasks": tasks,
            "by_layer_and_module": [layers] * len(tasks),
            "overlap": overlap.tolist(),
            "rows_attributed": [24] * len(tasks),
        }
        if importance
        else None,
        "provenance": {"command": "agcl run facts.yaml"},
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
        return [attributes for tag, attributes in self.tags if tag == "svg"]


@pytest.fixture
def rendered(undrawn, monkeypatch):
    """Renders only figures whose files begin with a text; most of a report's time goes there."""

    def only(begin):
        blank = figures.svg
        monkeypatch.setattr(
            figures, "svg", lambda f, file: (svg if file.startswith(begin) else blank)(f, file)
        )

    return only


@pytest.fixture
def drawn_page(tmp_path):
    def write(*runs, title="facts"):
        write_report(tmp_path / "report.html", runs, title=title)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


@pytest.fixture
def page(undrawn, drawn_page):
    """The page without what its figures show, for tests of text and tables."""
    return drawn_page


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """The report on all recorded runs: its figures, its text and its folder."""
    file = tmp_path_factory.mktemp("comparison") / "report.html"
    drawn = write_report(file, [recorded(label) for label in LABELS], title="facts-compare")
    return drawn, file.read_text(encoding="utf-8"), file.parent


@pytest.fixture(scope="module")
def agcl(tmp_path_factory):
    """A recorded run without importances of entries, and its report."""
    file = tmp_path_factory.mktemp("agcl") / "report.html"
    one = recorded("agcl-seed0")
    write_report(file, [one], title="facts")
    return one, Page(file.read_text(encoding="utf-8"))


def shown(value):
    return "–" if value is None else f"{value:.3f}"


def table_with(seen, *header):
    return next(table for table in seen.tables if set(header) <= set(table[0]))


# Recorded runs


def test_the_page_of_one_run_shows_its_metrics_and_matrix(page):
    of_run = recorded("sequential-seed0").metrics
    seen = page(recorded("sequential-seed0"))
    sets = of_run["evaluation_sets"]
    for values, metrics in zip(sets.values(), seen.tables, strict=False):
        numbers = {**values, "forgetting": values["forgetting"]["mean"]}
        expected = ["sequential", *(shown(numbers[key]) for key in METRIC_TITLES)]
        assert metrics == [["Method", *METRIC_TITLES.values()], expected]
    matrices = [table for table in seen.tables if table[0][0] == "after training"]
    for values, table in zip(sets.values(), matrices, strict=True):
        after = zip(["base", *of_run["tasks"]], values["accuracy_matrix"], strict=True)
        assert table[1:] == [[task, *map(shown, row)] for task, row in after]
    assert "sequential keeps 0.36 of 1.00 learned after 3 tasks (backward transfer -0.96)." in (
        seen.text
    )
    assert "Comparison" not in seen.text
    assert "Importance" not in seen.text


def test_the_comparison_shows_means_seeds_and_differences(comparison):
    seen = Page(comparison[1])
    means, seeds = seen.tables[:2]
    assert {row[0]: row[1] for row in means[1:]} == {
        "sequentialmean of 2 seeds": "0.347± 0.176",
        "agclmean of 2 seeds": "*0.639± 0.000",
        "gate": "*0.639",
    }
    assert [row[0] for row in seeds[1:]] == [
        "sequential seed 0",
        "sequential seed 1",
        "agcl seed 0",
        "agcl seed 1",
        "gate",
    ]
    differences = table_with(seen, "sequential", "its controls")
    assert [row[1] for row in differences[1:]] == ["–", "0.292± 0.176", "0.278"]


def test_the_page_embeds_its_figures_and_refers_to_nothing_outside(comparison):
    drawn, text, _ = comparison
    seen = Page(text)
    of_set = ["forgetting", "stability-plasticity"]
    of_set += [f"accuracy-{method}" for method in ("sequential", "agcl", "gate")]
    expected = {f"{each}-{name}" for each in of_set for name in ("memorization", "generalization")}
    expected |= {"base", "base-learned", "training", "importance-gate", "overlap-gate"}
    assert set(drawn) == {f"{name}.svg" for name in expected}
    assert all(each.startswith("<?xml") and len(each) > 2000 for each in drawn.values())
    assert len(seen.images()) == len(drawn)
    assert all(len(image["aria-label"]) > 20 for image in seen.images())
    assert not re.search(r"https?://|url\((?!#)|@import|<script|<link|<img", text)
    assert all(attributes["href"].startswith("#") for tag, attributes in seen.tags if tag == "a")


def test_figures_follow_the_page_and_show_values_on_hover(comparison):
    svgs = re.findall(r"<svg.*?</svg>", comparison[1], flags=re.S)
    matrix = recorded("gate-seed0").metrics["evaluation_sets"]["memorization"]["accuracy_matrix"]
    titles = re.findall(r"<title>(.*?)</title>", "".join(svgs))
    assert f"2 valley, 1 harbour: {matrix[2][0]:.3f}" in titles
    assert f"gate, after 2: {matrix[2][0]:.3f}" in titles
    assert any(title.startswith("mlp.up_proj, layer 0: ") for title in titles)
    assert any(title.startswith("agcl: learning accuracy ") for title in titles)
    assert any(title.startswith("sequential: from ") for title in titles)
    for each in svgs:
        assert "currentColor" in each
        assert not re.search("#24292f|#fefefe", each)  # Ink and paper are the page's.
    assert len(comparison[1]) < 1_000_000


def test_the_importance_bar_has_numbers(comparison):
    assert len(re.findall(r">0\.\d+</text>", comparison[0]["importance-gate.svg"])) == 3


def test_the_header_says_what_was_trained_on_what_and_when(agcl):
    one, seen = agcl
    rows = sum(one.rows[task]["train"]["rows"] for task in TASKS)
    assert one.weights > 800_000
    assert f"builtin, {one.weights / 1e6:.1f}M weights" in seen.text
    assert f"facts, 3 tasks, {rows} training rows" in seen.text
    for title, value in (("Learning rate", "0.001"), ("Epochs", "20"), ("Batch size", "8")):
        assert f"{title}{value}" in seen.text
    assert time.strftime("Finished%Y-%m-%d %H:%M UTC", time.gmtime(one.finished)) in seen.text


def test_example_answers_are_right_and_wrong_ones_before_and_after(agcl):
    one, seen = agcl
    titles = ["", "Prompt", "Expected", "Base model", "After its training", "At the end"]
    tables = [table for table in seen.tables if table[0] == titles]
    assert len(tables) == len(TASKS)
    for table, rows in zip(tables, one.examples.values(), strict=True):
        assert [row[:4] for row in table[1:]] == [
            [row["kind"], row["prompt"].strip(), row["answer"].strip(), row["base"][0].strip()]
            for row in rows
        ]
    kinds = {row["kind"] for rows in one.examples.values() for row in rows}
    assert {"forgotten", "kept"} <= kinds
    for row in (row for rows in one.examples.values() for row in rows):
        was, still = row["learned"][1] >= 0.5, row["final"][1] >= 0.5
        assert row["kind"] == ("not learned" if not was else "kept" if still else "forgotten")
        assert still == (row["final"][0].strip() == row["answer"].strip())


def test_of_a_long_prompt_the_end_is_shown_too():
    """It often holds the question."""
    cut = _cut("Read this. " + "word " * 999 + "Who runs the shop?")
    assert cut.startswith("Read this. word")
    assert cut.endswith("word Who runs the shop?")
    assert " … 4724 characters … " in cut
    assert _cut("x" * 300) == "x" * 300


def test_a_method_has_its_color_in_every_report():
    of_all, of_two = styles_of(list(METHODS)), styles_of(["gate", "sequential"])
    assert len({style["color"] for style in of_all.values()}) == len(METHODS)
    assert of_two["gate"] == of_all["gate"]
    assert len({str(style) for style in of_all.values()}) == len(METHODS)
    twice = styles_of(["agcl seed 0 #1", "agcl seed 0 #2"])
    assert twice["agcl seed 0 #1"] != twice["agcl seed 0 #2"]


def test_the_table_of_metrics_lies_beside_the_report(comparison):
    folder = comparison[2]
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["evaluation_set"], row["method"], row["seeds"]) for row in rows[:3]] == [
        ("memorization", "sequential", "2"),
        ("memorization", "agcl", "2"),
        ("memorization", "gate", "1"),
    ]
    shown = table_with(Page(comparison[1]), "Method", "Average")
    for row, cells in zip(rows, shown[1:], strict=False):
        spread = f"± {float(row['average_95']):.3f}" if row["average_95"] else ""
        assert f"{float(row['average']):.3f}{spread}" == cells[1].strip("*")
    latex = (folder / "metrics.tex").read_text()
    assert latex.startswith("\\begin{tabular}{lrrrrrr}\n\\toprule\nMethod & Average & ")
    assert latex.count("\\\\") == 1 + 2 * 4


# The report again, from the folder alone


@pytest.fixture
def folder(tmp_path, undrawn):
    """The folder of a comparison, whose artifacts are gone."""
    found = tmp_path / "facts-compare"
    labels_of = ["sequential-seed0", "gate-seed0", "agcl-seed0"]
    for label in labels_of:
        shutil.copytree(RECORDED / label, found / label)
    write_runs(found, [found / label for label in labels_of])
    return found


def test_a_report_is_rewritten_from_the_folder_alone_and_in_its_order(folder, monkeypatch):
    monkeypatch.setattr("agcl.__version__", "99")
    seen = Page(rewrite_report(str(folder)).read_text(encoding="utf-8"))
    assert [row[0] for row in seen.tables[0][1:]] == ["sequential", "gate", "agcl"]
    one = Page(rewrite_report(str(folder / "gate-seed0")).read_text(encoding="utf-8"))
    assert [row[0] for row in one.tables[0][1:]] == ["gate"]
    assert recorded("gate-seed0").provenance["command"] in one.text


def test_a_folder_of_an_earlier_version_is_one_clear_line(folder):
    (folder / "gate-seed0" / "result.json").unlink()
    with pytest.raises(InputError, match=r"gate-seed0: written by an earlier version .*agcl run"):
        rewrite_report(str(folder))


def test_the_report_on_a_search_shows_the_best_run_and_the_trials(tmp_path, undrawn):
    folder = tmp_path / "facts-search"
    settings = [{"protect.0.energy": energy} for energy in (0.5, 0.8)]
    progress = (Progress(0.5, 0.75, None), Progress(0.625, 0.75, 0.5))
    tried = [
        Trial(0, settings[0], "failed", reason="stage train/1: loss"),
        Trial(1, settings[1], "finished", progress, 3.0),
    ]
    folder.mkdir()
    pq.write_table(trial_table(tried), folder / "trials.parquet")
    with pytest.raises(InputError, match=r"no finished run .*its trials are in trials\.parquet"):
        rewrite_report(str(folder))
    shutil.copytree(RECORDED / "agcl-seed0", folder / "best")
    seen = Page(rewrite_report(str(folder)).read_text(encoding="utf-8"))
    assert table_with(seen, "Method", "Average")[1][0] == "agcl"
    shown = [
        dict(zip(row[0], each, strict=True))
        for row in [table_with(seen, "trial")]
        for each in row[1:]
    ]
    assert [row["state"] for row in shown] == ["failed", "finished"]
    assert shown[0]["reason"] == "stage train/1: loss"
    assert (shown[1]["average"], shown[1]["protect.0.energy"]) == ("0.625", "0.8")


def test_the_page_lists_settings_stages_provenance_and_rows(agcl):
    one, seen = agcl
    rows = [row for table in seen.tables for row in table]
    assert one.config_yaml in seen.text
    assert one.provenance["command"] in seen.text
    assert ["torch", one.provenance["torch"]] in rows
    assert ["seed", "0"] in rows
    last = one.stages[-1]
    assert rows[-1] == [last.name, last.fingerprint[:12], f"{last.seconds:.1f}", "no"]
    assert f"{len(one.stages)} stages, {sum(s.seconds for s in one.stages):.1f} s computed" in (
        seen.text
    )
    counts = one.rows["valley"]["test"]
    expected = [str(counts[key]) for key in ("rows", "tokens", "answer_tokens")]
    assert ["valley", "exact_match", "test", *expected, "0", "0", "0"] in rows


def test_without_importances_of_entries_the_page_says_how_to_get_their_figures(agcl):
    one, seen = agcl
    assert f"Set {HOW_TO_GET_FIGURES}" in seen.text
    assert not any("importance" in image["aria-label"] for image in seen.images())
    attributed = one.importance["rows_attributed"]
    rows = table_with(seen, "Task", "Rows attributed (answered correctly)")[1:]
    assert rows == [[task, str(n)] for task, n in zip(TASKS, attributed, strict=True)]


def test_a_comparison_names_the_methods_without_importances_of_entries(comparison):
    assert f"For agcl, set {HOW_TO_GET_FIGURES}" in Page(comparison[1]).text


# Made-up results


def test_headline_states_what_each_method_keeps_best_first(page):
    four = {"tasks": [*TASKS, "mountain"], **FEW}
    seen = page(run("sequential", kept=0.4, **four), run("agcl", kept=0.6, **four))
    assert (
        "agcl keeps 0.70 of 1.00 learned after 4 tasks (backward transfer -0.40); "
        "sequential keeps 0.55 (-0.60)."
    ) in seen.text


def test_the_best_method_is_marked_where_methods_differ(page):
    runs = [run("agcl", kept=0.7, **FEW), run("sequential", kept=0.4, **FEW)]
    _, first, second = page(*runs, run("joint", kept=0.9, **FEW)).tables[0][:3]
    # Both learned the same and neither transferred forward; a bound is never the best.
    marked = {key for key, cell in zip(METRIC_TITLES, first[1:], strict=True) if cell[0] == "*"}
    assert marked == set(METRIC_TITLES) - {"learning_accuracy", "forward_transfer"}
    assert not any("*" in cell for cell in second)


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
    table = table_with(page(*runs), "its controls")
    rows = {row[0]: row[1:3] for row in table[1:]}
    # Two of three tasks have the score `kept`: 0.1 and 0.2 gained over sequential.
    assert rows["agcl"] == ["0.150± 0.635", "project_uniform 0.100± 1.271"]
    assert rows["sequential"] == ["–", "–"]


def test_what_changes_a_method_changes_its_controls_too(page):
    kept = {"sequential": [0.1, 0.4], "agcl+changes": [0.25, 0.7],
            "project_uniform+changes": [0.25, 0.4]}  # fmt: skip
    runs = [run(m, seed=s, kept=k, **FEW) for m, of in kept.items() for s, k in enumerate(of)]
    rows = {row[0]: row[1:3] for row in table_with(page(*runs), "its controls")[1:]}
    assert rows["agcl+changes"] == ["0.150± 0.635", "project_uniform 0.100± 1.271"]


def base_of(*, lost=0.0, kl=0.25, probes=("hellaswag", "piqa"), steps=3):
    """A block `base` whose probes fall and whose losses rise from task to task."""
    part = [step / steps for step in range(steps + 1)]
    return {
        "text_loss": [3.0 + lost * each for each in part],
        "kl": [kl * each for each in part],
        "kl_answers": [2 * kl * each for each in part],
        "probes": {name: [0.4 + i / 10 - lost * each / 10 for each in part]
                   for i, name in enumerate(probes)},
        "probes_acc": {name: [0.9] * (steps + 1) for name in probes},
    }  # fmt: skip


def test_mlflow_gets_what_the_base_still_knows_of_every_method_of_a_comparison():
    few = {"importance": False, "sets": ["memorization"]}
    runs = [run("agcl", seed=seed, base=base_of(lost=0.1 * seed), **few) for seed in (1, 3)]
    runs.append(run("sequential", base=base_of(lost=1.0), **few))
    before, *_, found = base_numbers(runs)
    assert (before["step"], before["base/agcl/text_loss"]) == (0, 3.0)
    assert found["step"] == 3
    assert found["base/agcl/text_loss"] == pytest.approx(3.2)
    assert found["base/agcl/text_loss_95"] == pytest.approx(1.271, abs=1e-3)
    assert found["base/sequential/text_loss"] == 4.0
    assert "base/sequential/text_loss_95" not in found
    kept = description(runs).partition("what the base model still knows")[2]
    assert "| `sequential` | " in kept
    assert "3.000 → 4.000" in kept


def test_what_the_base_still_knows_is_averaged_over_seeds(page, tmp_path):
    few = {"importance": False, "sets": ["memorization"]}
    runs = [run("agcl", seed=seed, base=base_of(lost=0.1 * seed), **few) for seed in (1, 3)]
    runs.append(run("sequential", base=base_of(lost=1.0), **few))
    table = table_with(page(*runs), "Measure", "Base")
    assert table[0] == [
        "Measure",
        "Method",
        "Base",
        "After harbour",
        "After valley",
        "After island",
    ]
    at = {row[0]: (row, table[i + 1]) for i, row in enumerate(table) if len(row) == 6}
    assert list(at)[1:] == ["mean of probes", "hellaswag", "piqa", "text losslower is better",
                            "KL (text)lower is better", "KL (answers)lower is better"]  # fmt: skip
    agcl, sequential = at["text losslower is better"]
    # 3.1 and 3.3 at the end: t(0.975, 1) * 0.1
    assert agcl[1:] == ["agcl", "3.000± 0.000", "3.067± 0.424", "3.133± 0.847", "3.200± 1.271"]
    assert sequential == ["sequential", "3.000", "3.333", "3.667", "4.000"]
    assert at["mean of probes"][1] == ["sequential", "0.450", "0.417", "0.383", "0.350"]
    with (tmp_path / "base.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "sequential"]
    losses = [(row["after_task"], row["value"]) for row in rows if row["measure"] == "text_loss"]
    assert [(int(at), float(value)) for at, value in losses] == [
        *enumerate(base_of(lost=1.0)["text_loss"])
    ]
    assert {row["measure"] for row in rows} == {"probes", "probes/hellaswag", "probes/piqa",
                                                "text_loss", "kl", "kl_answers"}  # fmt: skip


def test_base_kept_has_a_panel_per_measure_with_losses_inverted(rendered):
    """Up is better in every panel; here agcl has the better skills and the worse loss."""
    rendered("base-learned")
    few = {"importance": False, "sets": ["memorization"]}
    base = {"probes": {"piqa": [0.5, 0.5, 0.5, 0.45]}, "text_loss": [3, 3, 3, 4.5], "kl": [0] * 4}
    other = {"probes": {"piqa": [0.5, 0.5, 0.5, 0.35]}, "text_loss": [3, 3, 3, 3.5]}
    drawn = draw([run("agcl", base=base, **few), run("sequential", base=other, **few)])
    (twin,) = [picture.svg for picture in drawn if picture.section == "base-learned"]
    assert ">piqa (acc_norm)</text>" in twin
    assert ">text loss (nats, axis inverted)</text>" in twin
    assert "KL" not in twin  # One method has it.
    heights = {
        (name, measure): float(height)
        for name, measure, height in re.findall(
            r'<title>(agcl|sequential): learning accuracy [\d.]+, (piqa|text loss) [\d.]+</title>'
            r'.*?y="([\d.]+)"', twin, flags=re.S)
    }  # fmt: skip
    assert len(heights) == 4
    # SVG counts from the top.
    assert heights["agcl", "piqa"] < heights["sequential", "piqa"]
    assert heights["agcl", "text loss"] > heights["sequential", "text loss"]


def test_self_checks_show_the_worst(page):
    checks = {
        "train/2-b": {"movement_by_decile": None, "projection_leak": 1e-6, "directions_taken": 0.1},
        "train/3-c": {"movement_by_decile": None, "projection_leak": 3e-6, "directions_taken": 0.2},
    }
    gate = {"train/2-b": {**dict.fromkeys(checks["train/2-b"]), "movement_by_decile": [2.0, 0.5]}}
    rows = table_with(page(run(checks=checks, **FEW), run("gate", checks=gate, **FEW)), "Leak")
    assert rows[1:] == [["agcl", "3.0e-06", "0.200", "–"], ["gate", "–", "–", "2.00 0.50"]]


def taken(*shares, **names):
    """Checks of a projection that takes these shares of layers 0, 1, ... of one kind."""
    layers = {f"model.layers.{i}.mlp.up_proj.weight": share for i, share in enumerate(shares)}
    measured = {"movement_by_decile": None, "projection_leak": 0.0, "directions_taken": 0.5}
    return {**measured, "directions_by_layer": {**layers, **names}}


def test_taken_directions_are_drawn_by_layer_and_too_many_warned_of(page, rendered):
    checks = {"train/2-b": taken(0.9, 0.9), "train/3-c": taken(0.2, 0.6, lm_head=0.7)}
    of_agcl = [run(seed=0, checks=checks, config_yaml="protect: [{kind: gate}, {kind: project}]",
                   **FEW)]  # fmt: skip
    line = ("protection leaves less than half of the input directions of 2 of 3 layers for later "
            "tasks (most: lm_head, 70% taken); lower protect.1.energy")  # fmt: skip
    assert crowded(of_agcl) == [line]
    seen = page(*of_agcl)
    assert f"Warning: {line}." in seen.text
    assert any("protected input directions" in image["aria-label"] for image in seen.images())
    rendered("directions")
    (figure,) = [picture.svg for picture in draw(of_agcl) if picture.section == "directions"]
    titles = re.findall(r"<title>(.*?)</title>", figure)
    assert {"mlp.up_proj, layer 0: 0.20", "mlp.up_proj, layer 1: 0.60"} <= set(titles)
    with_base = replace(of_agcl[0], config_yaml="base: {protect: self}\nprotect: [{kind: project}]")
    assert crowded([with_base])[0].endswith("lower protect.0.energy or base.energy")


def test_a_config_is_read_as_it_was_written():
    """As YAML 1.2. In YAML 1.1 the name is a date, of no month 31, and the rate a text."""
    text = "name: 2024-31-12\ntraining: {learning_rate: 1e-3}\nprotect: [{kind: project}]"
    of_run = run(config_yaml=text, checks={"train/2-b": taken(0.9)}, **FEW)
    assert _facts([of_run])["Learning rate"] == "0.001"
    assert crowded([of_run])[0].endswith("lower protect.0.energy")


def test_half_the_directions_on_average_over_seeds_is_no_warning():
    runs = [
        run(seed=s, checks={"train/1-a": taken(share)}, **FEW) for s, share in enumerate((0.4, 0.6))
    ]
    assert crowded(runs) == []
    more = run(seed=2, checks={"train/1-a": taken(0.8)}, **FEW)
    assert "1 of 1 layers" in crowded([*runs, more])[0]
    assert crowded([*runs, more, run("gate", **FEW)])[0].startswith("agcl: protection leaves")


def test_checks_of_a_version_without_directions_by_layer_are_shown(undrawn):
    old = {"train/2-b": {key: value for key, value in taken(0.9).items() if "layer" not in key}}
    one = run(checks=old, **FEW)
    assert crowded([one]) == []
    assert not any(picture.section == "directions" for picture in draw([one]))


def test_rows_that_were_left_out_are_listed():
    counts = {"rows": 1200, "tokens": 36000, "answer_tokens": 2400, "too_long": 3, "empty": 2}
    assert left_out({"harbour": {"train": counts}}) == [
        "harbour: 5 of 1205 train rows left out: 3 longer than tasks.max_length or the model "
        "allows, "
        "2 without prompt or answer"
    ]


def test_same_method_and_seed_twice_is_not_averaged():
    runs = [run("agcl"), run("agcl"), run("ewc")]
    assert [group.label for group in runs_by_method(runs)] == [
        "agcl seed 0 #1",
        "agcl seed 0 #2",
        "ewc",
    ]


def test_names_are_shown_and_never_run(drawn_page):
    evil = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    seen = drawn_page(
        run(
            evil,
            sets=["memorization"],
            tasks=[evil, "a $x^2$ & $\\frac$", "名前"],
            config_yaml=f"# {evil}",
            stages=[StageRecord(evil, evil, 1.0, False)],
            provenance={"command": evil, evil: evil},
        ),
        title=evil,
    )
    assert not any(tag == "script" for tag, _ in seen.tags)
    assert not any("onerror" in attributes for _, attributes in seen.tags)
    assert seen.text.count(evil) >= 6
    assert "名前" in seen.text


def test_one_task_has_no_transfer_and_no_overlap(page):
    only = run(tasks=["only"], base={})
    seen = page(only)
    assert "agcl scores 1.00 after 1 task." in seen.text
    assert seen.tables[0][1] == ["agcl", "1.000", "–", "1.000", "–", "1.000", "–"]
    assert "still knows" not in seen.text
    assert "Overlap" not in seen.text
    assert {picture.section for picture in draw([only])} == {"forgetting", "accuracy", "importance"}


@pytest.mark.slow
def test_figures_with_more_tasks_than_numbers_fit():
    tasks = [f"a task with a long name {i}" for i in range(13)]
    runs = [run(tasks=tasks, seed=seed, sets=["memorization"]) for seed in (0, 1)]
    assert len(draw(runs)) == 5


@pytest.mark.slow
def test_importance_of_all_zeros_and_of_uneven_layers_is_drawn():
    importance = {
        "tasks": TASKS[:2],
        "by_layer_and_module": [
            {"c_attn": [0.0, 0.0], "lm_head": [0.0]},
            {"c_attn": [1.0, 2.0, 3.0]},
        ],
        "overlap": [[1, 0.0], [0.0, 1]],
        "rows_attributed": [0, 5],
    }
    drawn = draw([replace(run(**FEW), importance=importance)])
    assert {"importance", "overlap"} <= {picture.section for picture in drawn}


def test_evaluation_sets_whose_names_give_one_file_name_stay_apart(undrawn):
    changed = run(**FEW)
    (of_set,) = changed.metrics["evaluation_sets"].values()
    changed.metrics["evaluation_set"] = "a b"
    changed.metrics["evaluation_sets"] = {"a b": of_set, "a/b": of_set}
    assert len({picture.file for picture in draw([changed])}) == 4


def test_runs_over_different_tasks_are_refused(page):
    with pytest.raises(ValueError, match="one sequence of tasks"):
        page(run(tasks=["harbour", "valley"]), run(tasks=["valley", "harbour"]))


def test_no_run_is_refused(page):
    with pytest.raises(ValueError, match="at least one run"):
        page()


def printed(show, *arguments, width=80):
    out = io.StringIO()
    show(Console(file=out, width=width), *arguments)
    assert "…" not in out.getvalue()
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def test_the_comparison_fits_a_terminal_of_80_columns():
    methods = ("sequential", "agcl", "project_uniform", "gate_grad_x_param")
    runs = [
        run(method, seed=seed, kept=0.5 + 0.1 * seed, **FEW)
        for method in methods
        for seed in range(3)
    ]
    lines = printed(print_comparison, runs)
    (agcl,) = (line.split() for line in lines if line.startswith(" agcl"))
    # Two of three tasks keep 0.5, 0.6, 0.7: 0.733 on average, t(0.975, 2) * sd / sqrt(3) = .166
    expected = ["0.733", "±.166", "-0.400", "1.000", "0.000", "±.000", "0.000", "±.000"]
    assert agcl == ["agcl", "3", *expected]
    header = " ".join(" ".join(lines[:4]).split())
    assert "-sequential" not in header
    assert "vs vs" in header


def test_the_metrics_fit_a_terminal_of_80_columns_with_a_second_scorer():
    sets = ["memorization", "memorization-normalised_exact_match"]
    lines = printed(print_metrics, {"project_uniform": run("project_uniform", sets=sets)})
    # 0.35 of 0.556 is left of the first two tasks.
    expected = ["0.419", "-0.206", "0.556", "0.206", "0.000"]
    assert [line.split()[-5:] for line in lines].count(expected) == 1
    heads = " ".join(" ".join(lines[:4]).split())
    assert "backward learning forward" in heads
    assert "average transfer accuracy forgetting transfer" in heads


def test_the_matrix_of_many_tasks_fits_a_terminal_of_80_columns():
    tasks = [f"a task with a long name {i}" for i in range(30)]
    lines = printed(print_matrices, "agcl", run(tasks=tasks, sets=["memorization"]))
    last = [line.split() for line in lines if line.startswith("30 ") or line.startswith(" 30 ")]
    scores = [word for line in last for word in line if re.fullmatch(r"[01]\.\d{3}", word)]
    assert len(scores) == 30


def test_the_base_measures_of_one_run_fit_a_terminal_of_80_columns():
    probes = ("hellaswag", "piqa", "arc_easy_of_the_test_set", "winogrande")
    one = run(base=base_of(lost=1.0, probes=probes), importance=False)
    lines = printed(print_base, "agcl", one)
    rows = [line.split() for line in lines]
    after = [row for row in rows if row[:1] == ["island"]]
    expected = ["0.300", "0.400", "0.500", "0.600", "4.000", "0.250", "0.500"]
    assert [cell for row in after for cell in row[1:]] == expected
    assert len(after) == len([row for row in rows if row[:2] == ["base", "model"]]) > 1


def test_the_base_measures_of_methods_fit_a_terminal_of_80_columns():
    probes = [f"probe_{i}" for i in range(4)]
    runs = [
        run(method, seed=seed, base=base_of(lost=0.1 * seed, probes=probes[:count]))
        for count, method in ((4, "sequential"), (4, "gate_grad_x_param"))
        for seed in range(3)
    ]
    lines = printed(print_base_comparison, runs)
    rows = [line for line in lines if line.strip().startswith("sequential")]
    # Lost 0, 0.1, 0.2: t(0.975, 2) * 0.1 / sqrt(3) = .248
    cells = " ".join(" ".join(row.split()[1:]) for row in rows)
    assert cells == "0.550 → 0.540 ±.025 3.000 → 3.100 ±.248 0.250 ±.000 0.500 ±.000"
    assert "mean of" in "".join(lines)
    few = [run(m, base=base_of(probes=probes[:3])) for m in ("sequential", "agcl")]
    assert "mean of" not in "".join(printed(print_base_comparison, few))


def test_what_was_not_measured_of_the_base_is_not_printed():
    out = io.StringIO()
    print_base(Console(file=out), "agcl", run(base={}))
    print_base_comparison(Console(file=out), [run("agcl", base={}), run("sequential", base={})])
    assert out.getvalue() == ""


def test_joint_is_a_bound_also_where_it_protects_the_base(tmp_path, undrawn):
    after, before = ({task: {"test": score} for task in "ab"} for score in (0.9, 0.1))
    config = {"tasks": ["a", "b"], "method": "joint+changes"}
    assert _metrics(config, [before, after, after])["test"]["forward_transfer"] is None
    runs = [run("agcl", kept=0.7, **FEW), run("joint+changes", kept=0.9, **FEW)]
    write_report(tmp_path / "report.html", runs, title="x")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "joint+changes keeps" not in text
    assert 'class="headline">agcl keeps' in text


def test_each_control_has_a_line_of_its_own(tmp_path, undrawn):
    kept = {"agcl": 0.7, "base_unprotected": 0.4, "project_uniform": 0.55}
    runs = [run(method, kept=share, **FEW) for method, share in kept.items()]
    write_report(tmp_path / "report.html", runs, title="x")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    # Two of three tasks have the score `kept`.
    assert "<div>base_unprotected 0.200</div><div>project_uniform 0.100</div>" in text
