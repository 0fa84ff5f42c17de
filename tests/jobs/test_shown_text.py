"""What users wrote is shown as it is: in the terminal and the model card, no part of it acts."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from agcl.metrics import summary
from jobs import cli, output, tasks
from pipeline.config import loading
from pipeline.execution.progress import StageProgress
from pipeline.results.model_card import card
from pipeline.results.results import RunResult

NAMES = ["[red]a[/red]", "[/b]", "a`|<script>alert(1)</script>"]
"""Of tasks. The second one is an error in rich's markup."""


@pytest.fixture
def result():
    rows = [[0.0] * 3, [1.0, 0, 0], [1.0, 1, 0], [1.0, 1, 1]]
    metrics = {
        "method": "sequential",
        "seed": 0,
        "tasks": NAMES,
        "evaluation_set": "test",
        **summary(rows),
        "evaluation_sets": {"test": summary(rows)},
        "base": {"probes": {name: [0.25, 0.5, 0.5, 0.75] for name in NAMES}},
        "scorers": dict.fromkeys(NAMES, "a`b:c|d"),
    }
    evil = {"command": "agcl run\n# x `a` | <img src=x>"}
    return RunResult(metrics, "name: x\n</details><b>\n", [], None, evil)


def test_the_terminal_shows_names_as_they_are(result):
    console = Console(file=io.StringIO(), width=120)
    output.print_matrices(console, "run", result)
    shown = console.file.getvalue()
    for name in NAMES:
        assert shown.count(name) == 2  # A column and a row.


def test_the_terminal_shows_names_of_probes_as_they_are(result):
    console = Console(file=io.StringIO(), width=200)
    output.print_base(console, "run", result)
    output.print_base_comparison(console, [result])
    for name in NAMES[:2]:
        assert name[:12] in console.file.getvalue()


def test_progress_shows_names_as_they_are():
    console = Console(file=io.StringIO(), width=120)
    with StageProgress(console, {"a": "train/1-[/b]"}) as progress:
        progress.observe([{"artifact": "a", "state": "started"}])
        progress.observe([{"artifact": "a", "state": "finished"}])
    assert "done train/1-[/b] " in console.file.getvalue()


def test_escape_sequences_of_a_row_do_not_reach_the_terminal():
    shown = tasks._example([("a\x1b]0;title\x07\x1b[2Jb\n", False), ("\x9bc", True)]).plain
    assert shown == "a�]0;title��[2Jb\n»�c«"


def test_escape_sequences_do_not_reach_the_terminal_by_an_error(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"\\u001b[2J": "a"}\n')
    config = tmp_path / "config.yaml"
    config.write_text(f"tasks: {{format: jsonl, sequence: [{{name: a, train: {file}}}]}}\n")
    assert cli.main(["plan", str(config)]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert "no column 'prompt' (columns: �[2J)" in error
    assert "\x1b" not in error


def test_a_path_that_is_too_long_is_bad_input(capsys):
    assert cli.main(["plan", "x" * 5000]) == cli.BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_model_card_holds_names_in_code_alone(tmp_path, result):
    (tmp_path / "c.yaml").write_text("method: sequential\nmodel: {path: 'x/a`<b>|'}\n")
    lines = card(loading.load(tmp_path / "c.yaml"), result, None).splitlines()
    rows = [line for line in lines if "alert(1)" in line]
    assert rows == [
        "| `a'/<script>alert(1)</script>` | `a'b:c/d` |  | 0.000 | 1.000 | 1.000 |",
        "| `a'/<script>alert(1)</script>` | 0.250 | 0.750 |",
    ]
    assert "- command: `agcl run # x 'a' / <img src=x>`" in lines
    assert any(line.startswith("`a'<b>/`, fine-tuned on 3 tasks") for line in lines)
    # Four spaces make the config a code block, in which no tag is one.
    assert "    </details><b>" in lines
    assert not any(line.startswith("</details><b>") for line in lines)


def test_scores_that_are_all_zero_are_called_out(result):
    console = Console(file=io.StringIO(), width=400)
    output._advise(console, {"fine": result})
    assert not console.file.getvalue()
    nothing = summary([[0.0] * 3] * 4)
    sets = {"test": nothing, "paraphrases": nothing}
    metrics = {**result.metrics, "evaluation_sets": sets}
    output._advise(console, {"fine": result, "[red]bad": replace(result, metrics=metrics)})
    assert "its task's training: [red]bad. The report shows" in console.file.getvalue()
