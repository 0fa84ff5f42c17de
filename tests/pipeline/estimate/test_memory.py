"""Memory by the formula: what its terms are, and what to change where a stage does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest
from bench.sizes import METHODS, setting_of, shape_named, table

import agcl
from pipeline.config.conflicts import conflicts
from pipeline.estimate.disk import disk_per_task
from pipeline.estimate.fitting import fits, on_device, remedy
from pipeline.estimate.memory import main_memory, peaks
from pipeline.estimate.setting import Part, RowLength, Setting, total

GB = 10**9
LOADED = "the whole model while it loads"
SPEED = Path(agcl.__file__).with_name("SPEED.md")


@pytest.fixture(scope="module")
def large():
    return shape_named("Llama-3.2-1B")


def sizes(setting, kind):
    return {part.name: part.size for part in peaks(setting)[kind]}


def with_section(setting, section, **changes):
    of_section = getattr(setting.config, section).model_copy(update=changes)
    return replace(setting, config=setting.config.model_copy(update={section: of_section}))


def test_a_weight_that_is_trained_takes_sixteen_bytes(large):
    assert large.weights == 1_235_814_400
    setting = with_section(setting_of(large, "sequential"), "training", batch_size=64)
    parts = sizes(setting, "train")
    assert parts["weights"] + parts["gradients"] + parts["Adam"] == 16 * large.weights
    assert parts["bfloat16 copies"] == 2 * (large.linear_weights + 128256 * 2048)
    parts = sizes(with_section(setting, "training", activation_checkpointing=True), "train")
    assert parts["bfloat16 copies"] == 2 * (large.linear_weights // 16 + 128256 * 2048)


def test_autocast_keeps_all_copies_only_while_it_decodes(large):
    setting = with_section(setting_of(large, "sequential"), "evaluation", precision="bfloat16")
    setting = with_section(setting, "evaluation", batch_size=1)
    setting = replace(setting, row=RowLength(8, 2))
    assert sizes(setting, "evaluate")["a bfloat16 copy"] == 2 * 128256 * 2048
    assert "bfloat16 copies" not in sizes(setting, "evaluate")
    setting = with_section(setting, "evaluation", batch_size=64)
    setting = replace(setting, decodes=True, row=RowLength(2000, 2))
    copies = sizes(setting, "evaluate")["bfloat16 copies"]
    assert copies == 2 * (large.linear_weights + 128256 * 2048)


def test_a_moment_takes_four_bytes_per_pair_of_inputs_and_a_quarter_of_its_directions_is_kept(
    large,
):
    setting = replace(setting_of(large, "agcl"), row=RowLength(8, 2))
    parts, pairs = sizes(setting, "attribute"), 16 * (3 * 2048**2 + 8192**2)
    assert parts["moments"] == 4 * pairs
    assert parts["directions"] == pairs
    # In float16, twice: the task's own, and the sum of all so far.
    assert {part.name: part.size for part in disk_per_task(setting)}["importance"] == pairs


def test_a_wide_input_takes_a_sketch():
    setting = setting_of(shape_named("Llama-3.1-8B"), "agcl")
    parts = sizes(replace(setting, row=RowLength(8, 2)), "attribute")
    moments = 32 * (3 * 4096**2 + 14336 * 4096)
    assert parts["moments"] == 4 * (moments + 14336 * 4096)  # And a test matrix.


def test_entries_take_top_k_values_per_weight(large):
    setting = with_section(setting_of(large, "gate"), "importance", top_k=4)
    assert sizes(setting, "attribute")["running values"] == 16 * large.linear_weights
    halved = with_section(setting, "importance", running_values="bfloat16")
    assert sizes(halved, "attribute")["running values"] == 8 * large.linear_weights


def test_bfloat16_weights_are_attributed_without_a_copy_only_if_attribution_may_round(large):
    setting = setting_of(large, "agcl in bfloat16")
    rounded = with_section(setting, "importance", precision="bfloat16")
    assert sizes(setting, "attribute")["weights"] == 4 * large.weights
    assert sizes(rounded, "attribute")["weights"] == 2 * large.weights
    of_entries = with_section(rounded, "importance", entries=True, top_k=1)
    parts = sizes(replace(of_entries, row=RowLength(8, 2)), "attribute")
    assert parts["running values"] == 4 * large.linear_weights
    whole = on_device(setting, "attribute")
    assert on_device(rounded, "attribute") < whole - 2 * large.weights
    assert remedy(setting, "attribute", whole // 2).startswith("importance.precision=bfloat16")
    # Those of float32 weights get copies, which small passes do not make up for.
    plain = replace(setting_of(large, "agcl"), row=RowLength(256, 64))
    cast = with_section(plain, "importance", precision="bfloat16")
    copies = 2 * (large.linear_weights + 128256 * 2048)
    assert sizes(cast, "attribute")["bfloat16 copies"] == copies
    assert sizes(cast, "attribute")["activations"] < sizes(plain, "attribute")["activations"]
    short = [with_section(each, "importance", batch_size=1) for each in (plain, cast)]
    assert on_device(short[1], "attribute") > on_device(short[0], "attribute")


def test_bfloat16_weights_rounded_to_nearest_have_adams_means_in_bfloat16(large):
    setting = with_section(setting_of(large, "sequential"), "model", dtype="bfloat16")
    nearest = with_section(setting, "training", rounding="nearest")
    for each, size in ((setting, 8), (nearest, 4)):
        assert sizes(each, "train")["Adam"] == size * large.weights
        of_disk = {part.name: part.size for part in disk_per_task(each)}
        assert of_disk["checkpoint"] == (2 + size) * large.weights


def test_an_adapter_has_gradients_and_adam_of_its_factors_alone(large):
    parts = sizes(setting_of(large, "lora"), "train")
    factors = sum(8 * (out + width) for out, width in large.linears)
    assert parts["Adam"] == 8 * factors
    assert parts["adapter"] == 4 * factors
    assert parts["weights"] == 4 * large.weights


def test_relevance_in_float32_holds_repeated_keys_and_values_on_a_gpu(large):
    def activations(precision, on_gpu):
        setting = with_section(setting_of(large, "agcl"), "importance", precision=precision)
        setting = with_section(setting, "resources", gpus_per_worker=on_gpu)
        return sizes(setting, "attribute")["activations"]

    # Of 8 rows of 512 tokens, in every layer, and once for gradients.
    more = activations("float32", 1) - activations("float32", 0)
    assert more == 4 * 8 * 512 * 2 * (2048 - 512) * 17
    assert activations("bfloat16", 1) == activations("bfloat16", 0)


def test_training_in_float32_holds_them_too(large):
    def kept(on_gpu, **changes):
        setting = with_section(setting_of(large, "sequential"), "training", **changes)
        setting = with_section(setting, "resources", gpus_per_worker=on_gpu)
        return sizes(replace(setting, row=RowLength(512, 8)), "train")["activations"]

    rows = {"max_tokens": 4096, "batch_size": 8, "micro_batch_size": 8}
    more = kept(1, precision="float32", **rows) - kept(0, precision="float32", **rows)
    assert more == 4 * 8 * 512 * 2 * (2048 - 512) * 17
    assert kept(1, precision="bfloat16", **rows) == kept(0, precision="bfloat16", **rows)


def test_a_decomposed_weight_has_gradients_adam_and_its_old_factors(large):
    setting = setting_of(large, "osf")  # Of four built-in tasks, the first trains most.
    trained = kept = 0
    for out, width in large.linears:
        rank = min(out, width)
        high = int(rank * 0.75 / 4)
        trained += (rank - high) * (out + width + 1)
        kept += high * max(out, width) * (out != width)
    parts = sizes(setting, "train")
    assert parts["Adam"] == 8 * trained
    assert parts["factors"] == 4 * (2 * trained + kept)
    assert parts["weights"] == 4 * large.weights
    assert {p.name: p.size for p in disk_per_task(setting)}["checkpoint"] == 12 * trained
    more = with_section(setting, "subspace", unfreeze=0.75)
    assert sizes(more, "train")["Adam"] > parts["Adam"]
    for kind in peaks(setting):
        said = remedy(setting, kind, 40 * GB)
        assert said is None or "shard_model" not in said


def test_directions_of_weights_are_held_per_weight_and_nothing_is_attributed(large):
    setting = setting_of(large, "project_weights")
    assert list(peaks(setting)) == ["train", "evaluate"]
    bases = [-(-min(out, width) * 4 // 5) * width for out, width in large.linears]
    parts = sizes(setting, "train")
    assert parts["bases"] == 4 * sum(bases)
    assert parts["Adam"] == 8 * large.linear_weights
    assert {p.name: p.size for p in disk_per_task(setting)}["importance"] == 0


def test_corda_decomposes_all_layers_at_once_and_keeps_what_it_started_from(large):
    setting = setting_of(large, "corda")
    parts, lora = sizes(setting, "corda"), sizes(setting_of(large, "lora"), "train")
    assert parts["covariances"] == 4 * 16 * (6 * 2048**2 + 8192**2)
    narrow = 2 * 2048 * 4096 + 2 * 512 * 2560 + 3 * 2048 * 10240
    assert parts["singular vectors"] == 4 * 16 * narrow
    assert "attribute" not in peaks(setting)
    trained = sizes(setting, "train")
    assert trained.pop("factors at the start") == lora["adapter"]
    assert trained == lora
    of_disk = [
        {p.name: p.size for p in disk_per_task(s)} for s in (setting, setting_of(large, "lora"))
    ]
    assert of_disk[0]["adapter"] == 2 * of_disk[1]["adapter"]
    for kind in peaks(setting):
        said = remedy(setting, kind, 12 * GB)
        assert said is None or "shard_model" not in said


def test_a_penalty_of_fresh_factors_holds_the_importance_of_the_weights_below_them(large):
    parts = sizes(setting_of(large, "ewc_lora"), "train")
    assert parts["anchors and importance"] == 4 * large.linear_weights
    assert sizes(setting_of(large, "ewc"), "train")["anchors and importance"] == (
        8 * large.linear_weights
    )


def test_workers_share_weights_gradients_and_adam_of_a_sharded_model(large):
    one, eight = (sizes(setting_of(large, "sequential", n), "train") for n in (1, 8))
    assert eight["weights"] == one["weights"] // 8
    assert eight["Adam"] == one["Adam"] // 8
    assert "gathered layers" in eight


def test_recomputed_activations_and_smaller_passes_take_less(large):
    setting = setting_of(large, "sequential")
    at_once = sizes(setting, "train")["activations"]
    smaller = with_section(setting, "training", max_tokens=2048)
    assert sizes(smaller, "train")["activations"] == at_once // 4
    recomputed = with_section(setting, "training", activation_checkpointing=True)
    assert on_device(recomputed, "train") < on_device(setting, "train") - at_once // 2


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw_8bit"}])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_advised_fits_and_the_cheapest_is_advised_first(large, method, settings):
    setting = with_section(setting_of(large, method), "training", **settings)
    for kind in peaks(setting):
        for size in (8, 16, 24, 40, 80):
            if fits(setting, kind, size * GB):
                continue
            said = remedy(setting, kind, size * GB)
            if said and "method=" not in said:
                changed = setting
                for each in said.split():
                    key, _, value = each.partition("=")
                    section, _, name = key.partition(".")
                    known = {"true": True, "false": False}
                    given = known.get(value, int(value) if value.isdecimal() else value)
                    changed = with_section(changed, section, **{name: given})
                assert fits(changed, kind, size * GB), said
                assert not list(conflicts(changed.config)), said
    train = on_device(setting, "train")
    assert remedy(setting, "train", train).startswith("training.max_tokens=4096")


@pytest.mark.parametrize(
    ("settings", "dtype", "kind", "refused"),
    [
        ({"compile": True}, "float32", "evaluate", "shard_model"),
        ({"rounding": "nearest"}, "bfloat16", "train", "adamw_8bit"),
    ],
)
def test_what_the_config_excludes_is_not_advised(large, settings, dtype, kind, refused):
    setting = with_section(setting_of(large, "sequential"), "model", dtype=dtype)
    barred = with_section(setting, "training", **settings)
    said = [
        [remedy(each, kind, size * GB) or "" for size in range(1, 60)] for each in (setting, barred)
    ]
    assert any(refused in each for each in said[0])
    assert not any(refused in each for each in said[1])


def test_the_rows_that_the_base_is_measured_on_may_be_the_longest(large):
    short = replace(setting_of(large, "ewc_base"), row=RowLength(20, 4))
    own = replace(short, of_base=RowLength(1920, 640))
    assert sizes(own, "attribute") == sizes(replace(short, row=RowLength(1920, 640)), "attribute")
    assert on_device(own, "attribute") > 1.5 * on_device(short, "attribute")
    # With equal weights there is no backward pass, whatever the tasks' rows take.
    agcl = setting_of(large, "agcl")
    long = replace(agcl, of_base=RowLength(1920, 64))
    assert on_device(long, "attribute") == on_device(agcl, "attribute")
    weighed = with_section(replace(long, row=RowLength(20, 4)), "base", weighting="relevance")
    alike = replace(agcl, row=RowLength(1920, 64))
    assert on_device(weighed, "attribute") == on_device(alike, "attribute")


def test_models_trained_alone_are_kept_too(large):
    setting = setting_of(large, "gate")
    alone = with_section(setting, "importance", source="solo")
    sizes_of = [{p.name: p.size for p in disk_per_task(each)} for each in (setting, alone)]
    assert sizes_of[0]["model trained alone"] == 0
    assert sizes_of[1]["model trained alone"] == sizes_of[1]["model"]


def test_a_forward_pass_is_as_large_on_several_workers(large):
    """Batches are cut by `max_tokens`, so that numbers do not depend on the workers."""
    one, eight = (
        sizes(with_section(setting_of(large, "sequential"), "resources", num_workers=n), "train")
        for n in (1, 8)
    )
    assert eight["activations"] == one["activations"]


def test_a_model_too_large_for_one_gpu_is_shared_by_as_few_workers_as_it_takes():
    setting = setting_of(shape_named("Llama-3.1-8B"), "sequential")
    said = remedy(setting, "evaluate", 40 * GB)
    assert said.startswith("resources.shard_model=true resources.num_workers=4")
    for workers in (3, 4):  # Those that the config has come first.
        several = with_section(setting, "resources", num_workers=workers)
        assert remedy(several, "evaluate", 40 * GB) == "resources.shard_model=true"
    assert not fits(setting, "train", 80 * GB)
    # Workers share the weights, but each passes forward what fits `training.max_tokens`.
    shared = setting_of(setting.shape, "sequential", 8)
    assert remedy(shared, "train", 80 * GB) == "training.max_tokens=2048"
    # Nothing is cheaper than an adapter where smaller passes do not help.
    assert remedy(setting, "train", 70 * GB).startswith("method=lora ")


def test_a_gpu_holds_only_what_lies_on_it(large):
    setting = setting_of(large, "agcl")
    for parts in peaks(setting).values():
        host = sum(part.size for part in parts if part.on_host)
        assert total(parts, on_gpu=False) == total(parts, on_gpu=True) + host


def test_workers_of_a_machine_share_what_only_the_first_has(large):
    one = setting_of(large, "sequential")
    found = {part.name: part.size for part in main_memory(one)}
    # Trained in float32 on a GPU: a checkpoint copies weights and Adam's means.
    assert found["a checkpoint as it is written"] == 12 * large.weights
    never = with_section(one, "resources", checkpoint_minutes=0)
    assert main_memory(never)[0] == Part(LOADED, 4 * large.weights, on_host=True)
    several = setting_of(large, "sequential", 8)
    never = with_section(several, "resources", checkpoint_minutes=0)
    assert total(main_memory(never), on_gpu=False) == 8 * 4 * large.weights
    gated = {part.name: part.size for part in main_memory(setting_of(large, "gate", 8))}
    assert gated["gates in main memory"] == 8 * 4 * large.linear_weights
    assert gated["a checkpoint as it is written"] == 12 * large.linear_weights
    of_worker = total(peaks(several)["train"], on_gpu=False)
    on_cpu = with_section(several, "resources", gpus_per_worker=0)
    assert total(main_memory(on_cpu), on_gpu=False) >= 8 * of_worker


def test_decoded_answers_take_keys_and_values_of_all_layers(large):
    setting = replace(setting_of(large, "lora in bfloat16"), row=RowLength(2048, 64))
    setting = with_section(setting, "evaluation", batch_size=64)
    decoded = replace(setting, decodes=True)
    parts = sizes(decoded, "evaluate")
    assert parts["keys and values"] == 64 * 2048 * 16 * 512 * 2 * 2
    assert on_device(decoded, "evaluate") > on_device(setting, "evaluate")
    longer = with_section(decoded, "evaluation", max_new_tokens=512)
    assert sizes(longer, "evaluate")["keys and values"] == 64 * (1984 + 512) * 16 * 512 * 2 * 2
    said = remedy(decoded, "evaluate", on_device(decoded, "evaluate"))
    assert said.startswith("evaluation.batch_size=")
    # Rotated keys stay float32 under autocast.
    autocast = replace(decoded, config=setting_of(large, "lora").config)
    autocast = with_section(autocast, "evaluation", batch_size=64)
    assert sizes(autocast, "evaluate")["keys and values"] == 64 * 2048 * 16 * 512 * (4 + 2)


def test_longer_rows_take_more(large):
    setting = setting_of(large, "agcl")
    short = Setting(large, setting.config, RowLength(64, 16))
    for kind in ("train", "attribute"):  # Comparing with the base model has a limit of its own.
        assert on_device(short, kind) < on_device(setting, kind)


def test_the_table_in_the_documents_is_what_the_formula_gives():
    assert table() in SPEED.read_text(encoding="utf-8")


def test_sgd_keeps_one_number_per_weight_and_a_reference_model_two_bytes_on_a_gpu(large):
    sgd = with_section(setting_of(large, "sequential"), "training", optimizer="sgd")
    assert sizes(sgd, "train")["momentum"] == 4 * large.weights
    small = with_section(sgd, "training", optimizer="adamw_8bit")
    assert sizes(small, "train")["Adam"] == pytest.approx(2.03 * large.weights, rel=1e-3)
    parts = {part.name: part.size for part in disk_per_task(small)}
    assert parts["checkpoint"] == pytest.approx(6.03 * large.weights, rel=1e-3)
    anchored = with_section(setting_of(large, "sequential"), "loss", reference="base", strength=1.0)
    assert sizes(anchored, "train")["reference model"] == 2 * large.weights
    on_cpu = with_section(anchored, "resources", gpus_per_worker=0)
    assert sizes(on_cpu, "train")["reference model"] == 4 * large.weights
    silent = with_section(anchored, "loss", strength=0.0)
    assert "reference model" not in sizes(silent, "train")
    adapter = with_section(setting_of(large, "lora"), "loss", reference="base", strength=1.0)
    assert "reference model" not in sizes(adapter, "train")
    last = with_section(setting_of(large, "lora"), "loss", reference="previous", strength=1.0)
    assert sizes(last, "train")["reference model"] == 2 * large.weights
