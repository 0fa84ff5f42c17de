"""The benchmark command: it measures what it names, and refuses what it does not know."""

import json
from types import SimpleNamespace

import pytest
import torch
from reference import tiny

from bench import peaks
from bench.__main__ import SINGLE, main
from bench.measure import figure

SMALL = ("--threads", "1", "--rows", "2", "--tokens", "12", "--pairs", "2")
COMPILED = "compiled_step"
"""Takes half a minute to compile."""


@pytest.mark.slow
def test_every_figure_is_measured_and_written_as_json(tmp_path, capsys):
    names = [name for name in SINGLE if name != COMPILED]
    assert main([*names, *SMALL, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["figures"]
    assert [each["name"] for each in found] == names
    for each in found:
        assert 0 < each["low"] <= each["median"] <= each["high"], each
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == names


@pytest.mark.slow
def test_a_sweep_has_a_point_for_every_value(tmp_path):
    file = tmp_path / "found.json"
    assert main(["--sweep", "top_k", *SMALL, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["figures"] == []
    points = found["sweeps"]["top_k"]
    assert points.keys() == {"1", "2", "4", "8", "16"}
    assert all(seconds > 0 for point in points.values() for seconds in point.values())


def test_a_ratio_is_the_median_over_pairs_with_quartiles():
    found = figure("it", [(1.0, 2.0), (3.0, 2.0), (2.0, 2.0)], 1.3, "another")
    assert (found.median, found.low, found.high) == (1.0, 0.75, 1.25)
    assert found.values == (2.0, 2.0)


def test_quartiles_of_two_unequal_pairs_lie_between_them():
    found = figure("it", [(1.0, 1.0), (40.0, 2.0)], 1.3, "another")
    assert 1.0 < found.low < found.high < 20.0


def test_bases_of_a_measured_step_lie_in_main_memory_until_the_optimizer_places_them():
    on_device = SimpleNamespace(model=tiny.llama(), device=torch.device("meta"))
    assert {basis.device.type for basis in peaks._bases(on_device).values()} == {"cpu"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--rows-of", "nowhere.arrow"], "--rows-of: no file nowhere.arrow"),
    ],
)
def test_what_is_not_there_is_named(arguments, said, capsys):
    assert main(["attribute", *SMALL, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_unknown_figure_is_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["warp_speed"])
    assert caught.value.code == 2
    assert "no figure warp_speed" in capsys.readouterr().err
