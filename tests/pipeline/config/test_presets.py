"""Every named method on a tiny sequence, run in this process without Ray."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from agcl.importance import Importance
from agcl.metrics import summary
from agcl.model import models, subspace
from agcl.modulation import GatedAdamW
from agcl.scoring import probes
from agcl.scoring.evaluate import answer_kl
from agcl.tasks import EncodedRows
from agcl.train import train_task
from pipeline.config.presets import METHODS


@pytest.fixture(scope="module")
def run_method(tiny_config, run_in_process, tmp_path_factory):
    """Runs a method, but for the stages that another one ran; gives its resolved stages by name."""
    storage = tmp_path_factory.mktemp("methods") / "storage"

    def run(method, *settings):
        config = tiny_config(storage, WHOLE, *settings, method=method)
        return run_in_process(config)

    return run


WHOLE = "training.micro_batch_size=null"
"""Batches in one pass, in half the time."""


def metrics(resolved):
    return json.loads((resolved["report"].folder / "metrics.json").read_text())


def weights(resolved, stage="train/2-valley"):
    return load_file(resolved[stage].folder / "model.safetensors")


def same_bits(first, second):
    return all(torch.equal(first[k].view(torch.int32), second[k].view(torch.int32)) for k in first)


SETTINGS = {
    # At its default strength it keeps all of the base and learns next to nothing of so few rows.
    "ewc_base": ["protect.0.strength=1", "base.samples=2", "base.tokens=8"],
    "stm": ["loss.max_perplexity=300"],
    **{method: ["merge.factor=0.9"] for method in ("merge", "wise")},
    **{method: ["training.learning_rate=5e-3"] for method in METHODS if "lora" in method},
    "ewc_lora": ["training.learning_rate=5e-3", "protect.0.strength=10"],
}
"""With which a method learns so small a task."""


ALIKE = {
    *("gate_grad_x_param", "gate_fisher", "gate_magnitude", "gate_random", "project_answer"),
    *("project_raw", "base_unprotected", "kl_reverse", "merge_sqrt"),
    *("kl", "lwf", "asft", "stm", "merge", "wise"),  # tests/pipeline/stages/test_rivals.py
    *("das", "gate_permuted", "project_random", "project_weights", "ewc_lora", "corda"),
    *("project_uniform", "ewc_base", "olora", "freeze", "frozen_embeddings", "solo"),
    *("sequential", "gate", "joint", "lora", "inflora"),
}
"""Methods that differ from one tested here in one setting, or that other tests run."""


UNPROTECTED = ("sequential", "joint", "solo")


def marked(methods):
    return [pytest.param(m, marks=pytest.mark.slow) if m in ALIKE else m for m in methods]


@pytest.mark.parametrize("method", marked(METHODS))
def test_every_method_runs_and_learns(run_method, method):
    found = metrics(run_method(method, *SETTINGS.get(method, ())))
    assert found["method"] == method
    expected = 0.4 if "lora" in method or "random" in method else 0.5
    if method in ("asft", "stm"):  # Both learn little of what surprises the base model.
        expected = 0.2
    assert found["learning_accuracy"] > expected


QUICK = ["training.epochs=4", "importance.correct_only=false"]
"""Weights move, and nobody has to answer anything."""
FROM_THE_FIRST_TASK = {
    *("agcl", "project_uniform", "project_answer", "project_raw", "project_random"),
    *("osf", "corda", "project_weights", "ewc_base", "kl", "kl_reverse", "asft", "lwf", "stm"),
}


@pytest.mark.parametrize("method", marked(m for m in METHODS if m not in UNPROTECTED))
def test_every_method_differs_from_sequential_once_it_protects_something(run_method, method):
    plain, other = run_method("sequential"), run_method(method, *SETTINGS.get(method, ()))
    first = "train/1-harbour"
    shared = "lora" not in method and method not in FROM_THE_FIRST_TASK
    assert (plain[first].folder == other[first].folder) is shared
    assert same_bits(weights(plain, first), weights(other, first)) is shared
    last = "merge/2-valley" if "merge/2-valley" in other else "train/2-valley"
    assert not same_bits(weights(plain), weights(other, last))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("agcl", ["protect.0.energy=0", "base.energy=0"]),
        ("gate", ["protect.0.strength=0"]),
        pytest.param(
            *("gate", ["protect.0.strength=0", "protect.0.on=gradient", "base.protect=self"]),
            marks=pytest.mark.slow,
        ),
        pytest.param("ewc_base", ["protect.0.strength=0"], marks=pytest.mark.slow),
        pytest.param("das", ["protect.0.strength=0"], marks=pytest.mark.slow),
        pytest.param("gate_permuted", ["protect.0.strength=0"], marks=pytest.mark.slow),
        pytest.param(
            *("project_random", ["protect.0.energy=0", "base.energy=0"]), marks=pytest.mark.slow
        ),
        pytest.param("project_weights", ["protect.0.energy=0"], marks=pytest.mark.slow),
        ("replay", ["replay.fraction=0"]),
        ("freeze", ["freeze.layers=[]"]),
    ],
)
def test_without_strength_a_method_is_sequential_bit_for_bit(run_method, method, settings):
    plain, other = run_method("sequential", *QUICK), run_method(method, *settings, *QUICK)
    for stage in ("train/1-harbour", "train/2-valley"):
        assert same_bits(weights(other, stage), weights(plain, stage))
    assert metrics(other)["accuracy_matrix"] == metrics(plain)["accuracy_matrix"]
    # Trained by a stage of its own, not merely the same artifact.
    shared = other["train/2-valley"].folder == plain["train/2-valley"].folder
    assert shared is (method in ("replay", "freeze"))


@pytest.mark.slow
def test_a_projection_measures_no_entries_unless_asked_and_trains_the_same(run_method):
    whole, alone = run_method("agcl", "importance.entries=true"), run_method("agcl")
    assert whole["train/2-valley"].folder != alone["train/2-valley"].folder
    assert same_bits(weights(whole), weights(alone))
    shown, few = (
        json.loads((resolved["report"].folder / "importance.json").read_text())
        for resolved in (whole, alone)
    )
    assert shown.keys() - few.keys() == {"by_layer_and_module", "overlap"}
    assert few == {key: shown[key] for key in ("tasks", "rows_attributed")}


@pytest.mark.parametrize(
    ("method", "settings", "same_as"),
    [
        pytest.param("lora_agcl", ["protect.0.energy=0"], ("lora",), marks=pytest.mark.slow),
        pytest.param(
            *("lora_agcl", ["protect.0.kind=gate", "protect.0.strength=0"], ("lora",)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("lora_agcl", ["protect.0.kind=penalty", "protect.0.strength=0"], ("lora",)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("inflora", ["protect.0.energy=0"], ("olora", "adapter.orthogonal=0")),
            marks=pytest.mark.slow,
        ),
        ("ewc_lora", ["protect.0.strength=0"], ("olora", "adapter.orthogonal=0")),
        pytest.param(
            *("ewc_lora", ["protect.0.strength=0", "adapter.orthogonal=0.5"], ("olora",)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_without_strength_a_method_with_an_adapter_is_lora_bit_for_bit(
    run_method, method, settings, same_as
):
    plain, other = run_method(*same_as, *QUICK), run_method(method, *settings, *QUICK)
    assert same_bits(weights(other), weights(plain))


@pytest.mark.slow
def test_an_adapter_that_is_not_merged_is_all_that_is_written_and_scores_the_same(run_method):
    merged, apart = run_method("lora_agcl"), run_method("lora_agcl", "adapter.merge=false")
    folder = apart["train/2-valley"].folder
    assert not list(folder.glob("*.safetensors"))
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    beside = load_file(merged["train/2-valley"].folder / "adapter" / "adapter_model.safetensors")
    assert same_bits(adapter, beside)
    assert metrics(apart)["evaluation_sets"] == metrics(merged)["evaluation_sets"]
    # Merged, the base model is loaded beside the model; otherwise the adapter is switched off.
    kl_answers = [metrics(resolved)["base"]["kl_answers"] for resolved in (apart, merged)]
    assert kl_answers[0] == pytest.approx(kl_answers[1], rel=1e-3)
    assert min(kl_answers[0][1:]) > 1e-3
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").merge_and_unload()
    theirs, ours = loaded.state_dict(), weights(merged)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor)


@pytest.mark.slow
def test_freeze_with_an_adapter_leaves_the_factors_of_those_layers(run_method):
    resolved = run_method("lora", "freeze.layers=[1,3]", *QUICK)
    before, after = (
        load_file(resolved[stage].folder / "adapter" / "adapter_model.safetensors")
        for stage in ("train/1-harbour", "train/2-valley")
    )
    for name in before:
        inside = ".layers.1." in name or ".layers.3." in name
        assert torch.equal(before[name], after[name]) is inside, name


@pytest.mark.slow
def test_ewc_lora_measures_the_merged_weights_and_keeps_what_was_important(run_method):
    settings = ["training.learning_rate=5e-3", "importance.correct_only=false"]
    resolved = run_method("ewc_lora", "protect.0.strength=1e6", *settings)
    free = run_method("ewc_lora", "protect.0.strength=0", *settings)
    before, kept, moved = (
        weights(each, stage)
        for each, stage in (
            (resolved, "train/1-harbour"),
            (resolved, "train/2-valley"),
            (free, "train/2-valley"),
        )
    )
    assert same_bits(before, weights(free, "train/1-harbour"))
    fisher = Importance.load(
        resolved["attribute/1-harbour"].folder / "importance.safetensors"
    ).entries
    assert set(fisher) == {name for name in before if "_proj" in name}
    costs = [
        sum(float((f.double() * (after[n] - before[n]).double() ** 2).sum()) for n, f in pairs)
        for after, pairs in ((kept, fisher.items()), (moved, fisher.items()))
    ]
    assert 0 < costs[0] < 0.1 * costs[1]
    log = (resolved["train/2-valley"].folder / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["penalty"] == 0  # B is zero.
    last = json.loads(log[-1])["penalty"]
    assert 0.1 * 0.5e6 * costs[0] < last < 10 * 0.5e6 * costs[0]


@pytest.mark.slow
def test_ewc_lora_keeps_what_the_base_model_knew_from_the_first_task_on(run_method):
    settings = ["training.learning_rate=5e-3", "importance.correct_only=false"]
    free = run_method("ewc_lora", "protect.0.strength=0", *settings)
    off, on = (
        run_method("ewc_lora", f"protect.0.strength={strength}", "base.protect=self", *settings)
        for strength in (0, 1e6)
    )
    assert same_bits(weights(free), weights(off))
    fisher = Importance.load(on["attribute/0-base"].folder / "importance.safetensors").entries
    start = weights(on, "pretrain")
    assert set(fisher) == {name for name in start if "_proj" in name}
    kept, moved = (
        sum(float((f.double() * (after[n] - start[n]).double() ** 2).sum()) for n, f in pairs)
        for after, pairs in (
            (weights(each, "train/1-harbour"), fisher.items()) for each in (on, off)
        )
    )
    assert 0 < kept < 0.1 * moved


@pytest.mark.slow
@pytest.mark.parametrize("text", ["self", pytest.param("rows", marks=pytest.mark.slow)])
def test_corda_keeps_one_adapter_on_the_base_model_as_it_was(run_method, text):
    resolved = run_method("corda", f"base.protect={text}", "adapter.rank=3")
    base, start = weights(resolved, "pretrain"), resolved["corda"].folder
    for stage in ("train/1-harbour", "train/2-valley"):
        assert resolved[stage].inputs["model"] == resolved["pretrain"].folder
        assert resolved[stage].inputs["adapter"] == start
        start = resolved[stage].folder
        adapter = load_file(start / "adapter" / "adapter_model.safetensors")
        for name, weight in weights(resolved, stage).items():
            layer = "base_model.model." + name.removesuffix("weight")
            if f"{layer}lora_A.weight" not in adapter:
                assert torch.equal(weight, base[name]), name
                continue
            a, b = (adapter[f"{layer}lora_{factor}.weight"].double() for factor in "AB")
            assert a.shape[0] == 6
            update = 16 / 3 * b @ a
            assert update.abs().max() > 1e-3
            expected = base[name].double() + update
            torch.testing.assert_close(weight.double(), expected, rtol=1e-4, atol=1e-5)
    apart = run_method("corda", f"base.protect={text}", "adapter.rank=3", "adapter.merge=false")
    assert not list(apart["train/2-valley"].folder.glob("*.safetensors"))
    assert metrics(apart)["evaluation_sets"] == metrics(resolved)["evaluation_sets"]
    kl_answers = [metrics(each)["base"]["kl_answers"] for each in (apart, resolved)]
    assert kl_answers[0] == pytest.approx(kl_answers[1], rel=1e-2)


@pytest.mark.slow
def test_a_loss_compares_corda_with_the_base_model_and_not_with_what_is_below_its_factors(
    run_method,
):
    settings = ["base.protect=self", "adapter.init=corda", "training.epochs=1"]
    settings += ["loss.strength=100", "training.batch_size=12"]
    resolved = run_method("kl", "adapter={rank: 32}", *settings)
    rows = EncodedRows(resolved["prepare/harbour"].folder / "train.arrow")
    first = json.loads((resolved["train/1-harbour"].folder / "log.jsonl").open().readline())
    plain = run_method("lora", "training.epochs=1", "training.batch_size=12")
    other = json.loads((plain["train/1-harbour"].folder / "log.jsonl").open().readline())
    # Before its first step the model is the base model, from which it has not gone away.
    assert len(rows) == 12
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("before", "stage", "share"),
    [
        pytest.param("pretrain", "train/1-harbour", 0.35, marks=pytest.mark.slow),
        ("train/1-harbour", "train/2-valley", 0.7),
    ],
)
def test_osf_keeps_more_directions_of_the_last_model_with_every_task(
    run_method, before, stage, share
):
    resolved = run_method("osf", "subspace.unfreeze=0.3", *QUICK)
    assert resolved[stage].config["subspace"] == share
    assert resolved[stage].inputs.keys() == {"model", "rows"}
    model = models.load_model(resolved[before].folder)
    peft_model = subspace.attach(model, preserved=share)
    inner = peft_model.get_base_model()
    settings = resolved[stage].config
    train_task(
        inner,
        EncodedRows(resolved[f"prepare/{stage.partition('-')[2]}"].folder / "train.arrow"),
        GatedAdamW(
            [(name, p) for name, p in inner.named_parameters() if p.requires_grad],
            lr=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
        ),
        **{key: settings[key] for key in ("epochs", "batch_size", "micro_batch_size", "seed")},
    )
    expected = dict(subspace.merged(peft_model).named_parameters())
    found = weights(resolved, stage)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.slow
def test_a_projection_by_weights_keeps_each_task_off_the_leading_directions_of_the_last_model(
    run_method,
):
    resolved = run_method("project_weights", "protect.0.energy=0.6", *QUICK)
    assert not [name for name in resolved if name.startswith(("attribute", "own_text"))]
    for before, stage in (("pretrain", "train/1-harbour"), ("train/1-harbour", "train/2-valley")):
        assert resolved[stage].inputs.keys() == {"model", "rows"}
        old, new = weights(resolved, before), weights(resolved, stage)
        for name, weight in old.items():
            change = (new[name] - weight).double()
            if "_proj" not in name:
                assert not change.any(), name
                continue
            _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
            kept = values.square().cumsum(0) < 0.6 * values.square().sum()
            rank = int(kept.sum()) + 1
            assert (change @ right[:rank].T).norm() < 1e-3 * change.norm(), name
            assert (change @ right[rank:].T).norm() > 0.3 * change.norm(), name


@pytest.mark.slow
def test_freeze_with_osf_leaves_those_layers(run_method):
    resolved = run_method("osf", "freeze.layers=[1,3]", *QUICK)
    before, after = weights(resolved, "train/1-harbour"), weights(resolved)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if "_proj" in n and n.split(".")[2] in "02"}


@pytest.mark.parametrize(
    ("layers", "frozen"),
    [("[1,3]", {1, 3}), pytest.param("bottom_half", {0, 1}, marks=pytest.mark.slow)],
)
def test_freeze_leaves_exactly_the_named_layers_as_they_were(run_method, layers, frozen):
    resolved = run_method("freeze", f"freeze.layers={layers}", *QUICK)
    before, after = weights(resolved, "train/1-harbour"), weights(resolved)
    for name in before:
        inside = any(name.startswith(f"model.layers.{index}.") for index in frozen)
        assert torch.equal(before[name], after[name]) is inside, name


@pytest.mark.slow
def test_frozen_embeddings_leave_linear_layers_free(run_method):
    resolved = run_method("frozen_embeddings")
    before, after = weights(resolved, "train/1-harbour"), weights(resolved)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}


def test_replay_mixes_rows_of_earlier_tasks_in(run_method):
    logs = {
        method: (run_method(method)["train/2-valley"].folder / "log.jsonl").read_text().splitlines()
        for method in ("sequential", "replay")
    }
    # 12 rows in batches of 8, and 1 of the 12 earlier ones: 13 rows are 2 batches as well.
    assert len(logs["replay"]) == len(logs["sequential"])
    more = run_method("replay", "replay.fraction=0.5")
    log = (more["train/2-valley"].folder / "log.jsonl").read_text().splitlines()
    assert len(log) == len(logs["sequential"]) * 3 / 2


def test_joint_is_one_model_for_all_rows_of_the_matrix(run_method):
    found = metrics(run_method("joint"))
    _, after, again = found["accuracy_matrix"]
    assert after == again
    assert found["backward_transfer"] == 0
    assert found["forward_transfer"] is None
    assert [stage for stage in run_method("joint") if stage.startswith("train/")] == ["train/joint"]


def test_solo_scores_every_task_by_its_own_model(run_method):
    resolved = run_method("solo")
    rows = [
        json.loads((resolved[f"evaluate/{stage}"].folder / "scores.json").read_text())
        for stage in ("0-base", "1-harbour", "2-valley")
    ]
    for name, values in metrics(resolved)["evaluation_sets"].items():
        own = rows[1]["harbour"][name], rows[2]["valley"][name]
        assert values["accuracy_matrix"][1] == [own[0], rows[1]["valley"][name]]
        assert values["accuracy_matrix"][2] == list(own)
    base, model = "pretrain", resolved["train/2-valley"]
    assert model.inputs["model"] == resolved[base].folder


def test_every_metric_can_be_computed_again_from_the_predictions(run_method):
    resolved = run_method("agcl")
    matrix = []
    for stage in ("0-base", "1-harbour", "2-valley"):
        table = pq.read_table(
            resolved[f"evaluate/{stage}"].folder / "predictions.parquet"
        ).to_pylist()
        for row in table:
            assert row["predicted"] == row["answer"] or not row["score"]
        verdicts = {
            task: [
                row["score"]
                for row in table
                if row["task"] == task and row["evaluation_set"] == "memorization"
            ]
            for task in ("harbour", "valley")
        }
        matrix.append([sum(found) / len(found) for found in verdicts.values()])
    found = metrics(resolved)
    assert summary(matrix) == found["evaluation_sets"]["memorization"]


def test_rows_to_choose_by_are_never_rows_to_report(run_method):
    share = 0.4
    whole, split = (
        metrics(run_method("agcl")),
        metrics(run_method("agcl", f"evaluation.validation={share}")),
    )
    assert "validation" not in whole
    for name, values in whole["evaluation_sets"].items():
        parts = split["evaluation_sets"][name], split["validation"][name]
        for i, row in enumerate(values["accuracy_matrix"]):
            for j, score in enumerate(row):
                test, chosen_by = (part["accuracy_matrix"][i][j] for part in parts)
                # Of 12 rows some number n is for validation; the counts of right ones must add up.
                assert any(
                    test * (12 - n) + chosen_by * n == pytest.approx(score * 12)
                    for n in range(1, 12)
                )


def test_what_the_base_knew_is_measured_before_and_after_every_task(run_method, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Who lives in the harbour? " * 40)
    resolved = run_method("sequential", f"evaluation.text={text}", "evaluation.text_tokens=200")
    base = metrics(resolved)["base"]
    assert list(base) == ["kl_answers", "text_loss", "kl", "facts"]
    losses = base["text_loss"]
    assert [len(values) for values in base.values()] == [3] * 4
    assert len(set(losses)) == 3
    model = AutoModelForCausalLM.from_pretrained(resolved["train/2-valley"].folder)
    tokenizer = AutoTokenizer.from_pretrained(resolved["train/2-valley"].folder)
    ids = torch.tensor([tokenizer(text.read_text())["input_ids"][:200]])
    assert losses[-1] == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-4)
    first = AutoModelForCausalLM.from_pretrained(resolved["pretrain"].folder)
    of_base, of_model = (
        each(ids).logits[:, :-1].detach().double().log_softmax(-1) for each in (first, model)
    )
    expected = (of_base.exp() * (of_base - of_model)).sum(-1).mean()
    assert base["kl"] == [0.0, base["kl"][1], pytest.approx(float(expected), rel=1e-4)]
    for values in (base["kl"], base["kl_answers"]):
        assert min(values[1:]) > 1e-3


QUESTIONS = [
    {"context": f"Who lives in {place}?", "choices": [*names, "Mara"], "answer": i % 3}
    for i, place in enumerate(["the harbour", "the valley", "Rome"] * 4)
    for names in (["Ada Holm", "Bo"], ["nobody at all", "Cleo Ray"])
]


def test_probes_are_scored_before_and_after_every_task(run_method, tmp_path):
    for name, count in (("places", 24), ("few", 3)):
        lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS[:count])
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = f"[{tmp_path}/places.jsonl, {tmp_path}/few.jsonl]"
    resolved = run_method("sequential", f"evaluation.probes={files}", "evaluation.probe_rows=20")
    base, last = metrics(resolved)["base"], resolved["evaluate/2-valley"].folder
    rows = pq.read_table(last / "probes.parquet").to_pylist()
    folder = resolved["train/2-valley"].folder
    model, tokenizer = models.load_model(folder), AutoTokenizer.from_pretrained(folder)
    for name, count in (("places", 20), ("few", 3)):
        of_probe = [row for row in rows if row["probe"] == name]
        assert len({row["question"] for row in of_probe}) == len(of_probe) == count
        asked = [QUESTIONS[row["question"]] for row in of_probe]
        assert [row["answer"] for row in of_probe] == [each["answer"] for each in asked]
        expected = probes.score(
            model, tokenizer, [probes.Question(**each) for each in asked], batch_size=1
        )
        assert [(row["acc"], row["acc_norm"]) for row in of_probe] == [s[1:] for s in expected]
        for key, which in (("probes", "acc_norm"), ("probes_acc", "acc")):
            right = [row[which] == row["answer"] for row in of_probe]
            assert len(base[key][name]) == 3
            assert base[key][name][-1] == pytest.approx(sum(right) / count)
    log = [json.loads(line) for line in (last / "log.jsonl").read_text().splitlines()]
    assert [line["probes/few"] for line in log if "probes/few" in line] == [
        base["probes"]["few"][2]
    ]
    steps = [line["step"] for line in log if "of_steps" in line]
    assert steps == sorted(steps)
    assert len(set(steps)) > 4
    assert max(steps) == log[-2]["of_steps"]


@pytest.mark.parametrize(
    ("method", "stage", "tasks"),
    [("joint", "joint", ("harbour", "valley")), ("solo", "2-valley", ("valley",))],
)
def test_kl_answers_is_on_all_tasks_that_the_model_was_just_trained_on(
    run_method, method, stage, tasks
):
    resolved = run_method(method)
    base, model = (
        AutoModelForCausalLM.from_pretrained(resolved[name].folder)
        for name in ("pretrain", f"train/{stage}")
    )
    trained_on = [EncodedRows(resolved[f"prepare/{task}"].folder / "train.arrow") for task in tasks]
    rows = [each[i] for each in trained_on for i in range(len(each))]
    found = metrics(resolved)["base"]["kl_answers"]
    assert found[2] == pytest.approx(answer_kl(model, base, rows), rel=1e-5)
    assert (found[1] == found[2]) is (method == "joint")


def test_a_trial_measures_nothing_of_the_base_model(run_method, tmp_path):
    (tmp_path / "probe.jsonl").write_text(json.dumps(QUESTIONS[0]))
    settings = ["evaluation.validation=0.4", f"evaluation.probes=[{tmp_path}/probe.jsonl]"]
    resolved = run_method("sequential", *settings, "evaluation.rows=validation")
    assert "base" not in resolved["evaluate/1-harbour"].inputs
    assert json.loads((resolved["evaluate/1-harbour"].folder / "base.json").read_text()) == {}
    assert metrics(resolved)["base"].keys() == {"facts"}
