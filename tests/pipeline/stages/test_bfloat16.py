"""Runs with `model.dtype: bfloat16`: every method trains, is attributed and protects."""

import json
from statistics import fmean

import pytest
import torch
from bench.precision import shared_directions
from reference.sums import ANSWERS, QUESTIONS, base_folder
from safetensors.torch import load_file

from agcl.importance import Importance
from pipeline.config.check import check_inputs
from pipeline.config.loading import load
from pipeline.config.presets import METHODS
from pipeline.execution.session import run_stages
from pipeline.run import open_run
from pipeline.stages.context import Context
from pipeline.stages.files import IMPORTANCE_FILE

LLAMA = "LlamaForCausalLM"


QUICK_METHODS = ("agcl", "lora_agcl")
SLOW_METHODS = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in METHODS
    if name not in (*QUICK_METHODS, "corda")  # Which needs weights in float32.
]


@pytest.fixture
def half_run(tmp_path):
    """Runs two tasks in bfloat16, without Ray."""
    for task, some in (("one", slice(0, 3)), ("two", slice(3, 6))):
        rows = zip(QUESTIONS[some], ANSWERS[some], strict=True)
        lines = [json.dumps({"q": q, "a": a}) for q, a in rows]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(lines))
    base = base_folder(tmp_path / "base", LLAMA, torch.bfloat16)

    def run(method, *settings):
        sequence = [
            {"name": task, "train": str(tmp_path / f"{task}.jsonl")}
            | {"prompt": "{q}", "answer": "{a}"}
            for task in ("one", "two")
        ]
        raw = {
            "storage": str(tmp_path / "storage"),
            "method": method,
            "model": {"path": str(base), "dtype": "bfloat16"},
            "tasks": {"format": "jsonl", "sequence": sequence},
            "training": {"epochs": 10, "batch_size": 3, "learning_rate": 3e-3},
            "importance": {"correct_only": False},
        }
        (tmp_path / "config.yaml").write_text(json.dumps(raw))
        config = load(tmp_path / "config.yaml", settings)
        check_inputs(config)
        resolved = open_run(config).resolved
        run_stages(list(resolved.values()), Context(ray_data=False), lambda records: None)
        return resolved

    return run


@pytest.mark.parametrize("method", [*QUICK_METHODS, *SLOW_METHODS])
def test_every_method_trains_bfloat16_weights_and_holds(half_run, method):
    base = ["base.samples=4", "base.tokens=8"] * (method in ("agcl", "ewc_base"))
    resolved = half_run(method, *base)
    last = max(name for name in resolved if name.startswith("train/"))
    weights = load_file(resolved[last].folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    checked = resolved[last].folder / "checks.json"
    if method in ("agcl", "lora_agcl"):
        assert 0 < json.loads(checked.read_text())["projection_leak"] < 0.5
    if method == "gate":
        movement = json.loads(checked.read_text())["movement_by_decile"]
        assert movement[-1] < movement[0]


def test_factors_on_a_bfloat16_base_are_attributed_in_bfloat16_by_shared_inputs(half_run):
    rounded, exact = (
        Importance.load(
            half_run("lora_agcl", f"importance.precision={p}", "importance.entries=true")[
                "attribute/1-one"
            ].folder
            / IMPORTANCE_FILE
        )
        for p in ("bfloat16", "float32")
    )
    # Query, key and value read one input; each of the seven factors B reads what its A makes.
    assert rounded.inputs == exact.inputs
    layers = len(rounded.entries) // 14
    assert len(set(rounded.inputs.values())) == layers * (4 + 7)
    shares = shared_directions(exact, rounded).values()
    assert fmean(share for kind in shares for share in kind) > 0.98


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("agcl", ["protect.0.energy=0", "base.energy=0"]),
        ("gate", ["protect.0.strength=0"]),
        pytest.param(
            *("gate", ["protect.0.strength=0", "protect.0.on=gradient"]), marks=pytest.mark.slow
        ),
        pytest.param("ewc", ["protect.0.strength=0"], marks=pytest.mark.slow),
    ],
)
def test_without_strength_bfloat16_weights_are_those_of_sequential(half_run, method, settings):
    few = ["training.epochs=2", "base.samples=2", "base.tokens=4"]
    plain = half_run("sequential", *few)["train/2-two"].folder
    other = half_run(method, *few, *settings)["train/2-two"].folder
    assert plain != other
    expected, found = (load_file(folder / "model.safetensors") for folder in (plain, other))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
