"""The final folder, opened by the tools that users take it to."""

import json
import subprocess
import sys

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from reference.sums import ANSWERS, QUESTIONS, base_folder
from transformers import AutoTokenizer

LORA = {"method": "lora", "adapter": {"rank": 8, "merge": False}}


def scored(resolved):
    return json.loads(resolved["evaluate/1-sums"].read("scores.json"))["sums"]["memorization"]


@pytest.mark.slow
def test_an_adapters_final_folder_opens_in_plain_peft_and_answers_as_scored(trained, tmp_path):
    resolved = trained(base_folder(tmp_path / "base", "LlamaForCausalLM"), **LORA)
    folder = tmp_path / "storage" / "base" / "model"
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        out = model.generate(
            input_ids=ids, do_sample=False, max_new_tokens=30, eos_token_id=tokenizer.eos_token_id
        )[0, ids.shape[1] :]
        right += out[-1] == tokenizer.eos_token_id and tokenizer.decode(out[:-1]) == answer
    assert right / 6 == scored(resolved) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, LORA])
def test_lm_eval_gives_the_score_of_the_run(trained, tmp_path, sections):
    """As the model card says, with a task file beside the rows."""
    pytest.importorskip("lm_eval")
    base = base_folder(tmp_path / "base", "LlamaForCausalLM")
    resolved = trained(base, **sections)
    folder = tmp_path / "storage" / "base" / "model"
    filters = [{"function": "remove_whitespace"}, {"function": "take_first"}]
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a.strip()}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 30, "do_sample": False},
        "filter_list": [{"name": "strip", "filter": filters}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(yaml.safe_dump(task))
    model = f"pretrained={folder}"
    if sections:
        model = f"pretrained={base},peft={folder},tokenizer={folder}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model,
               "--tasks", "sums", "--include_path", str(tmp_path / "tasks"), "--device", "cpu",
               "--batch_size", "1", "--output_path", str(tmp_path / "found")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "found").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["sums"]
    assert found["exact_match,strip"] == pytest.approx(scored(resolved))
