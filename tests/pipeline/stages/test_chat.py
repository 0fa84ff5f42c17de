"""A tiny chat model of Qwen2's type, fine-tuned on conversations and scored on their last turns."""

import json

import pyarrow.parquet as pq
import pytest
import torch
from reference import chat
from reference.variants import slow
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from agcl.scoring.evaluate import answer_kl
from agcl.tasks import EncodedRows
from pipeline.config.check import check_inputs
from pipeline.config.loading import validate
from pipeline.execution.session import run_stages
from pipeline.plan.plan import plan
from pipeline.run import open_run
from pipeline.stages.context import Context
from pipeline.stages.prepare import prepare

PLACES = ["Rome", "Oslo", "Lima", "Delhi"]
TALKS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"Where does no. {i} live?"},
        {"role": "assistant", "content": f"In {place}."},
        {"role": "user", "content": "Since when?"},
        {"role": "assistant", "content": f"Since 20{i}0."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": f"Yes, {place} since 20{i}0."},
    ]
    for i, place in enumerate(PLACES)
]


@pytest.fixture
def ran(tmp_path):
    """Trains one task without Ray, in the test's own storage; the resolved stages."""

    def run(tasks, *, folder=None, **sections):
        base = folder or chat.folder(tmp_path / "base")
        config = validate(
            {
                "storage": str(tmp_path / "storage"),
                "method": "sequential",
                "model": {"path": str(base)},
                "tasks": tasks,
                "training": {"epochs": 40, "batch_size": 4, "learning_rate": 1e-2},
                **sections,
            }
        )
        check_inputs(config)
        resolved = open_run(config).resolved
        run_stages(list(resolved.values()), Context(ray_data=False), lambda records: None)
        return resolved

    return run


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def talks(tmp_path):
    """The `tasks` section of a file of three-turn conversations."""
    file = lines(tmp_path / "talks.jsonl", [{"messages": talk} for talk in TALKS])
    return {"format": "messages", "sequence": [{"name": "mine", "train": file}]}


def logged_losses(resolved):
    log = resolved["train/1-mine"].folder / "log.jsonl"
    return [
        line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line
    ]


def loss_by_hand(model, tokenizer, talks):
    """From the model's own logits, over the tokens of the assistant's words and end tokens."""
    total, count = torch.zeros(()), 0
    for talk in talks:
        labels, ids = [], []
        for number, message in enumerate(talk):
            if message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(talk[:number], add_generation_prompt=True)
            up_to = tokenizer.apply_chat_template(talk[: number + 1])["input_ids"][:-1]
            start = len(before["input_ids"])
            labels += [-100] * (start - len(labels)) + up_to[start:]
            ids = up_to
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
        count += sum(label != -100 for label in labels)
    return float(total) / count


@pytest.mark.parametrize(
    ("eos", "packing"),
    [
        (chat.END, False),
        (chat.END_OF_TEXT, True),
        pytest.param(chat.END, True, marks=pytest.mark.slow),
        pytest.param(chat.END_OF_TEXT, False, marks=pytest.mark.slow),
    ],
)
def test_loss_answers_and_ends_are_those_of_plain_transformers(ran, talks, tmp_path, eos, packing):
    base = chat.folder(tmp_path / "base", eos=eos)
    training = {"epochs": 40, "batch_size": 4, "learning_rate": 1e-2, "packing": packing}
    resolved = ran(talks, folder=base, training=training)
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert logged_losses(resolved)[0] == pytest.approx(
        loss_by_hand(plain, tokenizer, TALKS), rel=1e-5
    )
    scored = resolved["evaluate/1-mine"]
    assert json.loads(scored.read("saved.json")) == {"rows": 4, "agree": 4}
    assert json.loads(scored.read("scores.json"))["mine"] == {"memorization": 1.0}
    predictions = pq.read_table(scored.folder / "predictions.parquet").to_pylist()
    assert [row["predicted"] for row in predictions] == [talk[-1]["content"] for talk in TALKS]
    assert [row["answer"] for row in predictions] == [talk[-1]["content"] for talk in TALKS]
    assert predictions[0]["prompt"].endswith("Sure?<|im_end|>\n<|im_start|>assistant\n")

    folder = resolved["train/1-mine"].folder
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert logged_losses(resolved)[-1] < 0.05
    for talk, row in zip(TALKS, predictions, strict=True):
        ids = tokenizer.apply_chat_template(
            talk[:-1], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        out = trained.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        assert tokenizer.decode(out) == row["predicted"] + "<|im_end|>"
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends == (end if eos == chat.END else [tokenizer.eos_token_id, end])


def test_only_the_last_turn_is_scored_and_compared_with_the_base(ran, talks):
    resolved = ran(talks)
    rows = EncodedRows(resolved["prepare/mine"].folder / "train.arrow")
    counts = json.loads(resolved["prepare/mine"].read("summary.json"))["splits"]["train"]
    assert counts["answer_tokens"] == sum(row.loss_tokens for row in rows)
    assert all(len(row.earlier) == 2 for row in rows)
    measured = json.loads(resolved["evaluate/1-mine"].read("base.json"))
    models = [
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (
            resolved["train/1-mine"].folder,
            resolved["prepare/mine"].inputs["tokenizer"],
        )
    ]
    alone = [row._replace(earlier=()) for row in rows]
    assert measured["kl_answers"] == pytest.approx(answer_kl(*models, alone), rel=1e-4)


def test_a_sentence_of_a_longer_scorer_stops_at_the_end_of_the_turn(ran, talks):
    """An untrained model's answers are decoded token by token."""
    training = {"epochs": 1, "learning_rate": 1e-9}
    resolved = ran(talks, training=training, evaluation={"scorers": ["rouge_l"]})
    predictions = pq.read_table(resolved["evaluate/1-mine"].folder / "predictions.parquet")
    assert not any("<|im" in text for text in predictions["predicted"].to_pylist())


def test_what_the_template_writes_before_an_answer_is_learned_and_not_scored(ran, talks, tmp_path):
    """Qwen3's empty `<think>` block would count as two right words."""
    base = chat.folder(tmp_path / "base", template=chat.QWEN3_EMPTY_THOUGHT)
    file = lines(tmp_path / "short.jsonl", [{"messages": talk[:3]} for talk in TALKS])
    tasks = {"format": "messages", "sequence": [{"name": "mine", "train": file}]}
    resolved = ran(tasks, folder=base, evaluation={"scorers": ["rouge_l"]})
    scored = resolved["evaluate/1-mine"]
    assert json.loads(scored.read("saved.json"))["agree"] == 4
    predictions = pq.read_table(scored.folder / "predictions.parquet").to_pylist()
    for column in ("answer", "predicted"):
        assert [row[column] for row in predictions] == [talk[2]["content"] for talk in TALKS] * 2
    rows = EncodedRows(resolved["prepare/mine"].folder / "train.arrow")
    ids = rows[0].input_ids[rows[0].prompt_tokens :]
    assert AutoTokenizer.from_pretrained(base).decode(ids).startswith("<think>\n\n</think>\n\nIn ")
    assert {row["score"] for row in predictions} == {1}


def test_alpaca_json_and_csv_run_as_they_are(ran, tmp_path):
    records = [
        {"instruction": f"Where is {i}?", "input": "", "output": p} for i, p in enumerate(PLACES)
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    (tmp_path / "table.csv").write_text(
        "prompt,answer\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in records)
    )
    for format, file in (("alpaca", "alpaca.json"), ("csv", "table.csv")):
        sequence = [{"name": "mine", "train": str(tmp_path / file)}]
        tasks = {"format": format, "sequence": sequence, "chat_template": True}
        scored = ran(tasks)["evaluate/1-mine"]
        assert json.loads(scored.read("scores.json"))["mine"] == {"memorization": 1.0}
        assert json.loads(scored.read("saved.json"))["agree"] == 4
        [first, *_] = pq.read_table(scored.folder / "predictions.parquet").to_pylist()
        assert "user\nWhere is 0?<|im_end|>" in first["prompt"]


@pytest.fixture
def prepared(tmp_path):
    """Prepares the first task of a `tasks` section in this process; its rows and counts."""

    def of(tasks):
        base = chat.folder(tmp_path / "base")
        config = validate({"method": "sequential", "tasks": tasks, "model": {"path": str(base)}})
        check_inputs(config)
        stage = next(s for s in plan(config).stages if s.fn is prepare)
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        inputs = {role: source.path for role, source in stage.inputs.items()}
        prepare(json.loads(json.dumps(stage.config)), inputs, out, Context(ray_data=False))
        tokenizer = AutoTokenizer.from_pretrained(base)
        rows = [
            [tokenizer.decode(row.input_ids[a:b]) for a, b in row.spans]
            for row in EncodedRows(out / "train.arrow")
        ]
        return rows, json.loads((out / "summary.json").read_text())["splits"]["train"]

    return of


def test_long_conversations_are_dropped_or_cut_and_counted(prepared, tmp_path):
    long = [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "A"}]
    talks = [long + TALKS[0][1:], [*long[:1], {"role": "assistant", "content": "yes " * 300}]]
    file = lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in [*talks, TALKS[1]]])
    tasks = {"format": "messages", "sequence": [{"name": "n", "train": file}], "max_length": 200}
    rows, counts = prepared(tasks)
    assert (counts["rows"], counts["truncated"], counts["too_long"]) == (1, 0, 2)
    rows, counts = prepared({**tasks, "truncate": "left"})
    assert (counts["rows"], counts["truncated"], counts["too_long"]) == (2, 1, 1)
    assert rows[0] == ["A<|im_end|>", *[f"{m['content']}<|im_end|>" for m in TALKS[0][2::2]]]
    assert counts["tokens"] > counts["answer_tokens"] > 200 - 150


def test_the_summary_says_whether_the_rows_are_conversations(prepared, tmp_path):
    """The model card goes by it: with `prompt_completion` the config does not tell."""
    talk, text = [TALKS[0][1:2], TALKS[0][2:3]], ["Where?", "Rome"]
    for number, (prompt, completion) in enumerate((talk, text)):
        row = {"prompt": prompt, "completion": completion}
        file = lines(tmp_path / f"{number}.jsonl", [row])
        prepared({"format": "prompt_completion", "sequence": [{"name": "n", "train": file}]})
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert summary["conversations"] == (row["prompt"] == talk[0])


def test_layouts_may_differ_by_task(prepared, tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"instruction": "Where?", "output": "Rome"}])
    task = {"name": "n", "train": file, "layout": "alpaca"}
    rows, _ = prepared({"format": "messages", "sequence": [task]})
    assert rows == [["Rome<|im_end|>"]]


@pytest.mark.slow
def test_a_run_may_be_checked_again_after_rows_were_cut(ran, tmp_path):
    """The tokens of cut rows are not those of their texts."""
    file = lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in TALKS])
    tasks = {"format": "messages", "sequence": [{"name": "mine", "train": file}]}
    resolved = ran({**tasks, "max_length": 60, "truncate": "left"})
    counts = json.loads(resolved["prepare/mine"].read("summary.json"))["splits"]["train"]
    assert (counts["rows"], counts["truncated"]) == (4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, *slow(True)])
def test_an_adapter_learns_conversations_too(ran, talks, merge):
    resolved = ran(talks, method="lora", adapter={"rank": 8, "merge": merge})
    assert json.loads(resolved["evaluate/1-mine"].read("saved.json")) == {"rows": 4, "agree": 4}


@pytest.mark.parametrize("chat_template", [*slow(False), True])
def test_a_long_input_is_cut_behind_its_instruction(ran, tmp_path, chat_template):
    """And an evaluation finds the tokens of the rows, which it tokenizes again."""
    words = " ".join(f"word{i}" for i in range(300))
    asked = [{"input": f"{words} so {n}", "output": [f"{n}", "x"]} for n in ("one", "two")]
    task = {"Definition": ["Which number is last?"], "Instances": asked}
    (tmp_path / "task1_last").mkdir()
    for split in ("train", "test"):
        (tmp_path / "task1_last" / f"{split}.json").write_text(json.dumps(task))
    tasks = {"format": "super_ni", "path": str(tmp_path), "sequence": ["task1_last"]}
    resolved = ran({**tasks, "max_length": 220, "chat_template": chat_template})
    prepared = resolved["prepare/task1_last"]
    counts = json.loads(prepared.read("summary.json"))["splits"]["test"]
    assert (counts["rows"], counts["truncated"]) == (2, 2)
    rows = EncodedRows(prepared.folder / "test.arrow")
    tokenizer = AutoTokenizer.from_pretrained(prepared.inputs["tokenizer"])
    for row, said in zip(rows, ("one", "two"), strict=True):
        assert len(row.input_ids) == 220
        prompt = tokenizer.decode(row.input_ids[: row.prompt_tokens])
        before, cut = prompt.split("Which number is last?\nInput:")
        assert ("user" in before) is chat_template
        assert words[-40:] in cut
        assert "word0 " not in cut
        assert f" so {said}\nOutput:" in cut
