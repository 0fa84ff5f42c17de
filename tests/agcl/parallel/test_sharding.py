"""A model sharded over two ranks gives the same numbers as a whole one."""

from types import SimpleNamespace

import pytest
import torch
from reference import families, sharded, tiny
from reference.variants import slow
from torch import nn

from agcl.lrp import attributed_linears
from agcl.model import models
from agcl.model.builtin import builtin_tokenizer
from agcl.modulation import random_bases
from agcl.parallel import sharding

ROWS = tiny.random_rows(11)
LLAMA, GPT2 = "LlamaForCausalLM", "GPT2LMHeadModel"


def assert_close(found, expected, tolerance=1e-4):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def protections(architecture):
    """A gate with many values, a basis for a third of the inputs, and Fisher information."""
    generator = torch.Generator().manual_seed(1)
    model = families.model(architecture, dtype=torch.float32)
    shapes = {name: layer.weight.shape for name, layer in attributed_linears(model).items()}
    transposed = architecture == GPT2
    return {
        "gate": {n: torch.rand(s, generator=generator) for n, s in shapes.items()},
        "basis": random_bases(
            {n: torch.empty(s[not transposed], s[not transposed] // 3) for n, s in shapes.items()},
            seed=2,
        ),
        "fisher": {n: torch.rand(s, generator=generator) for n, s in shapes.items()},
    }


def test_gradients_are_plain_sums_on_every_device(monkeypatch):
    """nccl's premultiplied sum, torch's choice for a divide factor, zeroes bfloat16 gradients."""
    told = {}

    class Recorder(nn.Module):
        def set_gradient_divide_factor(self, factor):
            told["factor"] = factor

        def set_force_sum_reduction_for_comms(self, on):
            told["sum"] = on

    monkeypatch.setattr(sharding, "FSDPModule", Recorder)
    monkeypatch.setattr(sharding, "fully_shard", lambda *args, **options: None)
    monkeypatch.setattr(sharding, "DeviceMesh", SimpleNamespace(from_group=lambda *args: None))
    sharding.shard(Recorder(), torch.device("cuda"))
    assert told == {"factor": 1.0, "sum": True}


@pytest.mark.parametrize("architecture", [LLAMA, *slow(GPT2, "Gemma2ForCausalLM")])
@pytest.mark.parametrize(
    "kinds", [*slow((), ("gate",), ("basis",)), ("fisher",), ("gate", "basis")]
)
def test_training_matches_a_whole_model(workers, architecture, kinds):
    """Eleven rows in micro-batches of three: the second rank has none in some steps."""
    chosen = {kind: protections(architecture)[kind] for kind in kinds}
    steps, weights = sharded.task(architecture, ROWS, **chosen)
    for found, shared in workers.run(sharded.task, architecture, ROWS, **chosen):
        for each, expected in zip(found, steps, strict=True):
            assert each == pytest.approx(expected, rel=1e-6)
        assert_close(shared, weights, 1e-6)


@pytest.mark.parametrize("architecture", [LLAMA, *slow(GPT2)])
def test_bfloat16_weights_are_rounded_alike_in_shards_and_whole(workers, architecture):
    """Gates only on every second weight; a basis of transposed weights is on whole ones."""
    both = protections(architecture)
    gate = {name: both["gate"][name] for name in list(both["gate"])[::2]}
    basis = {} if architecture == GPT2 else both["basis"]
    expected = sharded.rounded_steps(architecture, gate, basis)
    for found in workers.run(sharded.rounded_steps, architecture, gate, basis):
        assert_close(found, expected, 0 if architecture == GPT2 else 1e-2)
        equal = sum((found[n] == w).sum().item() for n, w in expected.items())
        assert equal >= 0.999 * sum(w.numel() for w in expected.values())


@pytest.mark.parametrize("architecture", [*slow(LLAMA), GPT2])
def test_directions_of_sharded_weights_are_those_of_whole_ones(workers, architecture):
    expected = sharded.directions_of_weights(architecture)
    assert expected
    for found in workers.run(sharded.directions_of_weights, architecture):
        assert_close(found, expected, 0)


@pytest.mark.parametrize("setting", ["checkpointing", *slow("packed")])
def test_a_frozen_weight_keeps_its_bits_with_every_memory_setting(workers, setting):
    frozen = "model.layers.0.mlp.up_proj.weight"
    steps, weights = sharded.task(LLAMA, ROWS, frozen=frozen)
    before = sharded.weights_of(families.model(LLAMA))
    for found, shared in workers.run(sharded.task, LLAMA, ROWS, frozen=frozen, **{setting: True}):
        assert torch.equal(shared[frozen], before[frozen])
        assert found[-1] == pytest.approx(steps[-1], rel=1e-6)
        assert_close(shared, weights, 1e-6)


@pytest.mark.parametrize("architecture", [LLAMA, *slow(GPT2)])
def test_scores_match_a_whole_model(workers, architecture):
    """Seven rows in batches of two: the second rank repeats a batch instead of deadlocking."""
    rows = tiny.answered_rows(families.model(architecture, dtype=torch.float32), 7, wrong=(0, 4))
    verdicts, texts, losses = sharded.scores(architecture, rows)
    assert verdicts == [index not in (0, 4) for index in range(7)]
    for found in workers.run(sharded.scores, architecture, rows):
        assert found[:2] == (verdicts, texts)
        assert found[2] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("architecture", [LLAMA, *slow(GPT2, "Phi3ForCausalLM")])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 2, "moments": "relevance"},
        {"top_k": None, "rules": "cp"},
        {"estimator": "fisher"},
    ],
)
def test_importance_matches_a_whole_model(workers, architecture, options):
    entries, moments, header, _ = sharded.importance(architecture, ROWS, **options)
    for found in workers.run(sharded.importance, architecture, ROWS, split="layers", **options):
        assert found[2] == header
        assert found[3], "weights or their flags are not as before"
        assert_close(found[0], entries)
        assert_close(found[1], moments)


def test_only_the_first_rank_returns_the_entries_if_asked(workers):
    entries, _, _, _ = sharded.importance(LLAMA, ROWS)
    options = {"split": "layers", "everywhere": False}
    first, second = workers.run(sharded.importance, LLAMA, ROWS, **options)
    assert_close(first[0], entries)
    assert second[0] == {}


@pytest.mark.parametrize("weighting", ["relevance", *slow("uniform")])
def test_moments_without_entries_match_a_whole_model(workers, weighting):
    options = {"moments": weighting, "entries": False}
    _, moments, _, _ = sharded.importance(LLAMA, ROWS, **options)
    for found in workers.run(sharded.importance, LLAMA, ROWS, split="layers", **options):
        assert found[0] == {}
        assert_close(found[1], moments)


def test_a_sharded_model_cannot_be_split_by_samples(workers):
    with pytest.raises(ValueError, match="split by layers"):
        workers.run(sharded.importance, LLAMA, ROWS, split="samples")


def test_stages_run_in_sequence_on_one_sharded_model(workers):
    losses = sharded.stages(ROWS)
    for found in workers.run(sharded.stages, ROWS):
        assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("architecture", [LLAMA, *slow(GPT2)])
@pytest.mark.parametrize(
    "settings", [*slow({}), {"protected": True}, *slow({"checkpointing": True})]
)
def test_an_adapter_on_a_sharded_model_is_that_on_a_whole_one(
    workers, architecture, settings, tmp_path
):
    """Every rank has all factors; the weights below them stay sharded."""
    first, again = tmp_path / "first", tmp_path / "again"
    alone = [sharded.adapted(architecture, ROWS, save=first, **settings)]
    alone.append(sharded.adapted(architecture, ROWS, start=first, **settings))
    shared = [workers.run(sharded.adapted, architecture, ROWS, save=again, **settings)]
    shared.append(workers.run(sharded.adapted, architecture, ROWS, start=again, **settings))
    weights = sharded.weights_of(families.model(architecture))
    for expected, ranks in zip(alone, shared, strict=True):
        for found in ranks:
            assert found.losses == pytest.approx(expected.losses, rel=1e-6)
            assert_close(found.factors, expected.factors, 1e-6)
            assert_close(found.entries, expected.entries, 1e-6)
            assert_close(found.merged, expected.merged, 1e-6)
            assert found.merged.keys() == weights.keys()
            assert len(found.sharded) == len(weights)
            assert not any("lora" in name for name in found.sharded)


@pytest.mark.parametrize("architecture", [*slow(LLAMA), "Gemma2ForCausalLM"])
def test_ranks_hold_shards_and_save_the_whole_model(workers, architecture, tmp_path):
    """Gemma's embeddings are tied to its head."""
    tokenizer = builtin_tokenizer(["some text"], vocab_size=300)
    shares = workers.run(sharded.saved, architecture, tokenizer, tmp_path)
    expected = sharded.weights_of(families.model(architecture, dtype=torch.float32))
    loaded = models.load_model(tmp_path)
    assert type(loaded).__name__ == architecture
    found = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
        assert [share[name][0] for share in shares] == [(len(weight) + 1) // 2, len(weight) // 2]


def test_a_part_begins_with_the_row_that_torch_gave_it(workers):
    found = workers.run(sharded.first_rows, [1, 5, 8])
    assert found == [[(0, 1), (0, 3), (0, 4)], [(1, 0), (3, 2), (4, 4)]]


def test_a_rank_that_waits_for_another_one_reads_no_position_beyond_the_last(workers):
    """The prompt of ten tokens has room for two more, while the other one gets eight."""
    given = [list(range(2, 12)), [2, 3]], 8, 12
    expected = sharded.continued(*given)
    assert workers.run(sharded.continued, *given) == [expected, expected]
