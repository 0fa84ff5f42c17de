"""Every task format, read into tokens: what is kept, counted and refused.

In this process, and with `-m slow` also by Ray Data, as `tests/pipeline/test_end_to_end.py` does.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from datasets import Dataset, DatasetDict
from reference import trace_files
from tokenizers.normalizers import Replace

from agcl.errors import InputError
from agcl.model import models
from agcl.model.builtin import builtin_model, builtin_tokenizer
from agcl.tasks import EncodedRows, facts
from pipeline.config import check_data
from pipeline.config.check import check_inputs
from pipeline.config.loading import validate
from pipeline.plan.plan import plan
from pipeline.stages.context import Context
from pipeline.stages.prepare import FILES, prepare

ROOT = Path(__file__).parents[3]
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "

ITEM = {
    "task": {
        **{"format": "jsonl", "name": "mine"},
        **{"prompt": "{prompt}", "answer": "{answer}"},
    },
    "selection": {"train_rows": None, "test_rows": None, "validation": 0.0, "seed": 0},
    "max_length": 50,
    "truncate": "drop",
    "chat_template": False,
}


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(params=["here", pytest.param("on Ray", marks=[pytest.mark.slow, pytest.mark.ray])])
def context(request):
    if request.param == "on Ray":
        request.getfixturevalue("cluster")
    return Context(ray_data=request.param == "on Ray")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = builtin_tokenizer(
        row.prompt for row in facts.base(entities=8, seed=0).splits["train"]()
    )
    tokenizer.chat_template = CHAT
    models.save(builtin_model(len(tokenizer), seed=0), tokenizer, folder)
    return folder


@pytest.fixture
def prepared(tmp_path, model_folder, context):
    """Checks a config of these tasks and prepares the first; its texts by split, its summary."""

    def of(tasks, **evaluation):
        config = validate(
            {
                "method": "sequential",
                "tasks": tasks,
                "model": {"path": str(model_folder)},
                "evaluation": evaluation,
            }
        )
        check_inputs(config)
        stage = next(s for s in plan(config).stages if s.fn is prepare)
        inputs = {role: source.path for role, source in stage.inputs.items()}
        assert all(role == "tokenizer" or role.startswith(FILES) for role in inputs)
        out = tmp_path / "out"
        out.mkdir()
        # As it comes back from a manifest.
        prepare(json.loads(json.dumps(stage.config)), inputs, out, context)
        tokenizer = models.load_tokenizer(model_folder)
        texts = {}
        for file in out.glob("*.arrow"):
            rows = EncodedRows(file)
            texts[file.stem] = [
                (tokenizer.decode(ids[:prompt]), tokenizer.decode(ids[prompt:]))
                for ids, prompt, _ in map(rows.__getitem__, range(len(rows)))
            ]
        return texts, json.loads((out / "summary.json").read_text())

    return of


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_rows_too_long_or_empty_are_left_out_and_counted(prepared, tmp_path):
    rows = [{"q": "a b", "a": "c"}, {"q": "long " * 100, "a": "c"}, {"q": "d", "a": " "}]
    train = lines(tmp_path / "train.jsonl", [*rows, {"q": "e", "a": 7}, {"q": "", "a": "x"}])
    item = {"name": "mine", "train": train, "prompt": "Q: {q}\n", "answer": "{a}"}
    texts, summary = prepared({"format": "jsonl", "sequence": [item], "max_length": 50})
    assert texts == {"train": [("Q: a b\n", "c<end>"), ("Q: e\n", "7<end>")]}
    counts = summary["splits"]["train"]
    assert (counts["rows"], counts["too_long"], counts["empty"]) == (2, 1, 2)
    assert counts["answer_tokens"] == 4
    assert summary["scored"] == {"memorization": "train"}


def test_a_row_that_became_unreadable_after_the_check_is_named(tmp_path, model_folder, context):
    file = tmp_path / "rows.jsonl"
    lines(file, [{"prompt": "a", "answer": "b"}, {"prompt": "c"}])
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: no column 'answer'"):
        prepare(ITEM, {"tokenizer": model_folder, "file/train": file}, tmp_path, context)


def test_rows_without_tokens_are_left_out_as_empty(tmp_path):
    """A tokenizer may strip a prompt or an answer to nothing; training needs a token of both."""
    long = ("a " * 60, "b")
    rows = [{"prompt": p, "answer": a} for p, a in (("#", "b"), ("b", "#"), ("a", "b"), long)]
    lines(tmp_path / "rows.jsonl", rows)
    tokenizer = builtin_tokenizer(["a b"] * 4)
    tokenizer.backend_tokenizer.normalizer = Replace("#", "")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    inputs = {"tokenizer": tmp_path / "tokenizer", "file/train": tmp_path / "rows.jsonl"}
    said = []
    prepare(ITEM, inputs, tmp_path, Context(ray_data=False, warn=said.append))
    counts = json.loads((tmp_path / "summary.json").read_text())["splits"]["train"]
    assert (counts["rows"], counts["empty"], counts["too_long"]) == (1, 2, 1)
    assert said == [
        "1 train rows are longer than 50 tokens and are left out; tasks.truncate=left cuts their "
        "prompts instead"
    ]


def test_a_folder_a_task_with_splits_by_file_name(prepared, tmp_path):
    folder = tmp_path / "capitals"
    folder.mkdir()
    for split, count in (("train", 3000), ("test", 5), ("validation", 2)):
        table = pa.table(
            {"prompt": [f"{split} {i}:" for i in range(count)], "answer": ["a"] * count}
        )
        pq.write_table(table, folder / f"{split}.parquet")
    tasks = {"format": "parquet", "sequence": [{"path": str(folder)}]}
    texts, summary = prepared(tasks, validation=0.1)
    assert [prompt for prompt, _ in texts["train"]] == [f"train {i}:" for i in range(3000)]
    assert len(texts["validation"]) == 2
    assert summary["scored"] == {"test": "test", "validation": "validation"}


def test_validation_rows_come_from_the_training_rows_and_cuts_are_kept(prepared, tmp_path):
    train = lines(tmp_path / "a.jsonl", [{"prompt": f"{i}?", "answer": "x"} for i in range(200)])
    test = lines(tmp_path / "b.jsonl", [{"prompt": f"{i}!", "answer": "x"} for i in range(50)])
    tasks = {"format": "jsonl", "sequence": [{"name": "n", "train": train, "test": test}]}
    texts, _ = prepared({**tasks, "train_rows": 100, "test_rows": 10}, validation=0.2)
    assert {split: len(rows) for split, rows in texts.items()} == {
        "train": 100,
        "test": 10,
        "validation": 10,
    }
    assert not set(texts["train"]) & set(texts["validation"])


def test_a_chat_template_renders_the_prompt_as_a_message(prepared, tmp_path):
    rows = [{"prompt": "Hi?", "answer": " Yes"}, {"prompt": " ", "answer": "No"}]
    train = lines(tmp_path / "a.jsonl", rows)
    tasks = {"format": "jsonl", "sequence": [{"name": "n", "train": train}], "chat_template": True}
    texts, summary = prepared(tasks)
    assert summary["splits"]["train"]["empty"] == 1
    assert texts["train"] == [("[user] Hi?\n[assistant] ", "Yes<end>")]


def test_trace_from_its_layout(prepared, tmp_path):
    trace_files.write(tmp_path / "trace", rows=6)
    texts, summary = prepared({"format": "trace", "path": str(tmp_path / "trace"), "order": 2})
    assert texts["train"][0][0].startswith("Sam has")
    assert {split: len(rows) for split, rows in texts.items()} == {"train": 6, "test": 2}
    assert summary["scored"] == {"test": "test"}


def test_traces_own_config_keeps_prompts_longer_than_the_model(prepared, tmp_path):
    """MeetingBank's have 2,853 words on average."""
    trace_files.write(tmp_path / "trace", rows=6)
    for file in (tmp_path / "trace" / "MeetingBank").iterdir():
        rows = json.loads(file.read_text(encoding="utf-8"))
        long = [{**row, "prompt": "the council met again " * 700} for row in rows]
        file.write_text(json.dumps(long), encoding="utf-8")
    shipped = yaml.safe_load((ROOT / "jobs/configs/trace.yaml").read_text(encoding="utf-8"))
    place = {"path": str(tmp_path / "trace"), "sequence": ["MeetingBank"]}
    _, summary = prepared({**shipped["tasks"], **place})
    assert summary["splits"]["train"]["truncated"] == 6


def test_a_hugging_face_data_set_in_a_folder(prepared, tmp_path):
    data = Dataset.from_dict({"q": ["a", "b"], "n": [1, 2]})
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "letters")
    item = {"path": str(tmp_path / "letters"), "prompt": "{q} is", "answer": " {n}"}
    texts, _ = prepared({"format": "huggingface", "sequence": [item]})
    assert texts == {
        "train": [("a is", " 1<end>"), ("b is", " 2<end>")],
        "test": [("b is", " 2<end>")],
    }


def test_the_rows_of_equal_sources_are_checked_once_until_a_file_changes(tiny_config, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n')
    task = f"tasks={{format: jsonl, sequence: [{{name: a, train: {file}}}]}}"
    with pytest.MonkeyPatch.context() as patch:
        read = []
        patch.setattr(
            check_data, "check_rows", lambda task, split, check, file: read.append((split, file))
        )
        for method in ("sequential", "agcl", "gate"):
            check_inputs(tiny_config(tmp_path, task, method=method))
    assert read == [("train", str(file))]
    file.write_text("no JSON\n")
    with pytest.raises(InputError, match="line 1"):
        check_inputs(tiny_config(tmp_path, task))
