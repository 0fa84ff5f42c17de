"""The model card of a recorded run."""

import yaml
from reference.record_run import recorded

from agcl.metrics import summary
from pipeline.results.model_card import card
from pipeline.results.results import RunResult


def test_the_card_shows_tasks_scores_and_provenance(tiny_config, tmp_path):
    one = recorded("gate-seed0")
    text = card(tiny_config(tmp_path, method="gate"), one, "0123abc")
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "transformers"
    matrix = one.metrics["accuracy_matrix"]
    for index, task in enumerate(one.metrics["tasks"]):
        before, right_after, at_the_end = (
            f"{row[index]:.3f}" for row in (matrix[0], matrix[index + 1], matrix[-1])
        )
        row = f"| `{task}` | `exact_match` | 12 | {before} | {right_after} | {at_the_end} |"
        assert row in text.splitlines()
    keys = ("average_performance", "backward_transfer", "learning_accuracy")
    for name, of_set in one.metrics["evaluation_sets"].items():
        numbers = " | ".join(f"{of_set[key]:.3f}" for key in keys)
        assert f"| `{name}` | {numbers} |" in text.splitlines()
    before, *_, now = one.metrics["base"]["facts"]
    assert f"| `facts` | {before:.3f} | {now:.3f} |" in text.splitlines()
    assert "- MLflow run: `0123abc`" in text.splitlines()
    assert f"- torch: `{one.provenance['torch']}`" in text.splitlines()
    assert "    method: gate" in text.splitlines()


def test_an_adapter_is_loaded_with_peft(tiny_config, tmp_path):
    text = card(tiny_config(tmp_path, method="lora"), recorded("gate-seed0"), None, adapter=True)
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"
    assert "from peft import AutoPeftModelForCausalLM" in text.splitlines()
    assert "- MLflow run: not recorded" in text.splitlines()
    assert "--enable-lora --max-lora-rank 8 --lora-modules tiny=FOLDER" in text
    assert "pretrained=BASE,peft=FOLDER,tokenizer=FOLDER" in text


def test_the_card_says_how_to_serve_and_evaluate_the_model(tiny_config, tmp_path):
    settings = ["tracking.register_model=mine", "model.path=org/tiny", f"model.revision={'a' * 40}"]
    text = card(tiny_config(tmp_path, *settings), recorded("gate-seed0"), None)
    lines = text.splitlines()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "org/tiny"
    assert "vllm serve FOLDER" in lines
    assert "lm_eval --model hf --model_args pretrained=FOLDER --tasks arc_easy" in lines
    assert "apply_chat_template" not in text
    assert "apply_chat_template" in card(
        tiny_config(tmp_path), recorded("gate-seed0"), None, chat=True
    )
    assert "mlflow models serve --model-uri models:/mine/VERSION --env-manager local" in lines


def test_the_card_of_solo_says_which_model_it_is(tiny_config, tmp_path):
    found = summary([[0, 0], [0.9, 0], [0.9, 0.8]])
    metrics = {"method": "solo", "seed": 0, "tasks": ["a", "b"], "evaluation_set": "test", **found,
               "evaluation_sets": {"test": found}, "scorers": {}}  # fmt: skip
    text = card(tiny_config(tmp_path, method="solo"), RunResult(metrics, "", [], None, {}), None)
    assert "one after the other" not in text
    assert "fine-tuned on `b` alone" in text
    assert "the other rows are those of models that this folder does not have" in text
