"""`agcl search`: what it refuses, and what it shows while trials run."""

import io
from dataclasses import replace

from rich.console import Console

from jobs import cli
from jobs.search import _described
from jobs.trials import TrialTable, trial_table
from pipeline.config.search import Choice, Float, Int
from pipeline.search.trial import Progress, Trial

HALF = Progress(average=0.5, learned=0.75, retained=None)
DONE = Progress(average=0.625, learned=0.75, retained=0.5)
SETTINGS = {"protect.0.energy": 0.8123, "importance.top_k": None}


def test_a_bad_space_or_nothing_to_resume_ends_before_any_work(agcl):
    file = agcl.place.parent / "config.yaml"
    file.write_text("search: {space: {training.epoch: {type: int, low: 1, high: 2}}}")
    code, lines = agcl("search", file, "--trials", 3)
    assert code == cli.BAD_INPUT
    assert lines == ["agcl: search.space.training.epoch: unknown key (did you mean 'epochs'?)"]
    file.write_text("name: mine")
    code, lines = agcl("search", file, "--resume")
    assert code == cli.BAD_INPUT
    assert "mine-search holds no search to resume" in lines[0]
    assert not list(agcl.place.iterdir())


def shown(*changes, width=100, terminal=False):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    with TrialTable(console, 3) as observe:
        for trial in changes:
            observe(trial)
    return out.getvalue()


def test_without_a_terminal_every_change_is_a_line():
    running = Trial(0, SETTINGS)
    half = Trial(0, SETTINGS, progress=(HALF,))
    lines = shown(
        running,
        running,
        half,
        Trial(0, SETTINGS, "finished", (HALF, DONE)),
        Trial(1, SETTINGS, "failed", reason="stage train/1-a: loss nan"),
    ).splitlines()
    assert len(lines) == 4, lines
    assert "trial 0 running, task 1, average 0.500, learning accuracy 0.750, retained -" in lines[1]
    assert (
        "trial 0 finished, task 2, average 0.625, learning accuracy 0.750, retained 0.500"
        in lines[2]
    )
    assert "1/3 done, best 0.625 (trial 0), about " in lines[2]
    assert "trial 1 failed (" in lines[3]
    assert "(stage train/1-a: loss nan)" in lines[3]


def test_on_a_terminal_there_is_a_live_table():
    text = shown(Trial(0, SETTINGS), Trial(0, SETTINGS, "finished", (HALF, DONE)), terminal=True)
    assert "retained" in text
    assert "1/3 done, best 0.625 (trial 0)" in text


def test_the_final_table_has_the_settings_and_marks_the_best_in_80_columns():
    out = io.StringIO()
    trials = [
        Trial(0, SETTINGS, "finished", (HALF, DONE)),
        Trial(1, SETTINGS, "stopped", (HALF,)),
        Trial(2, SETTINGS, "failed"),
    ]
    Console(file=out, width=80).print(trial_table(trials, 2, trials[0]))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["learning"]
    assert lines[2].split() == [
        "trial", "state", "task", "average", "accuracy", "retained", "energy", "top_k",
    ]  # fmt: skip
    assert lines[4].split() == [
        "0", "*", "finished", "2", "0.625", "0.750", "0.500", "0.8123", "null",
    ]  # fmt: skip


def test_what_the_base_still_knows_is_a_column_where_it_was_measured():
    out = io.StringIO()
    trials = [Trial(0, SETTINGS, "finished", (replace(DONE, base_kept=-3.2),)), Trial(1, SETTINGS)]
    Console(file=out, width=80).print(trial_table(trials, 0))
    first, second = (row.split() for row in out.getvalue().splitlines()[4:6])
    assert first == ["0", "finished", "1", "0.625", "0.750", "0.500", "-3.200"]
    assert second == ["1", "running", "0", "-", "-", "-", "-"]
    assert "base kept -3.200" in shown(trials[0], terminal=False)


def test_a_dimension_is_described_in_words():
    rate = Float(type="loguniform", low=1e-4, high=1e-2)
    assert _described(rate) == "0.0001 to 0.01, loguniform"
    assert _described(Int(type="int", low=2, high=8)) == "2 to 8, int"
    assert _described(Choice(type="choice", values=(True, 0.5))) == "one of True, 0.5"
