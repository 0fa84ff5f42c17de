"""Results name a method by what its sections do."""

import pytest

from pipeline.config.naming import method_description, method_name
from pipeline.config.presets import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_has_its_own_name(tiny_config, tmp_path, method):
    config = tiny_config(tmp_path, method=method)
    assert method_name(config) == method
    assert method_description(config) == METHODS[method].description


@pytest.mark.parametrize(
    ("method", "settings", "name"),
    [
        ("agcl", ["protect.0.energy=0.5", "importance.samples=3"], "agcl"),
        ("agcl", ["importance.top_k=null", "importance.entries=true"], "agcl"),
        ("agcl", ["importance.correct_only=false"], "agcl"),
        ("sequential", ["importance.correct_only=false", "importance.rules=cp"], "sequential"),
        ("replay", ["replay.fraction=0.3"], "replay"),
        ("agcl", ["protect.0.kind=gate"], "agcl+changes"),
        ("agcl", ["protect.0.kind=gate", "base.protect=none"], "gate"),
        ("gate", ["protect=[{kind: project}]"], "base_unprotected"),
        ("gate", ["protect=[{kind: project}]", "base.protect=self"], "agcl"),
        ("agcl", ["base.protect=none"], "base_unprotected"),
        ("agcl", ["base.weighting=relevance"], "agcl+changes"),
        ("agcl", ["base.energy=0"], "agcl+changes"),
        ("ewc", ["base.protect=self"], "ewc_base"),
        ("agcl", ["protect.0.unit_inputs=false"], "project_raw"),
        ("agcl", ["protect.0.energy=0"], "agcl+changes"),
        ("agcl", ["protect.0.directions=weights"], "project_weights"),
        (
            "project_weights",
            ["protect.0.weighting=uniform", "base.protect=self"],
            "project_weights",
        ),
        ("project_weights", ["protect.0.energy=0"], "project_weights+changes"),
        ("agcl", ["protect.1={kind: project}", "protect.0={kind: gate}"], "agcl+changes"),
        ("agcl", ["replay.fraction=0.1"], "agcl+changes"),
        ("agcl", ["importance.rules=cp"], "agcl+changes"),
        ("sequential", ["base.protect=self"], "sequential"),
        ("agcl", ["base.samples=9", "base.energy=0.7", "base.tokens=5"], "agcl"),
        ("freeze", ["freeze.layers=[0]"], "freeze+changes"),
        ("lora", ["adapter.fresh=true"], "lora+changes"),
        ("osf", ["subspace.unfreeze=0.5"], "osf"),
        ("osf", ["replay.fraction=0.1"], "osf+changes"),
    ],
)
def test_the_name_follows_the_sections(tiny_config, tmp_path, method, settings, name):
    assert method_name(tiny_config(tmp_path, *settings, method=method)) == name


def test_the_description_says_what_differs(tiny_config, tmp_path):
    changed = ["importance.rules=cp", "replay.fraction=0.1"]
    said = method_description(tiny_config(tmp_path, *changed, method="agcl"))
    assert said.startswith(METHODS["agcl"].description)
    assert "importance.rules=cp" in said
    assert "replay.fraction=0.1" in said
    of_base = tiny_config(tmp_path, "base.weighting=relevance")
    assert method_description(of_base).endswith("changed: base.weighting=relevance")
    both = ["protect=[{kind: gate}, {kind: project}]"]
    assert "protect.1.kind=project" in method_description(tiny_config(tmp_path, *both))
