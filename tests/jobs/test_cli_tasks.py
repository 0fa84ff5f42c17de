"""Task files as a user brings them: what is refused, and what `agcl tasks` shows."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference import chat, trace_files

from agcl.tasks import encode, messages
from agcl.tasks.encoding import encoded_rows
from jobs import cli
from jobs.tasks import _example, _parts
from pipeline.config import loading
from pipeline.config.check import check_inputs
from pipeline.config.row_lengths import longest_row
from pipeline.execution.session import run_stages
from pipeline.stages.context import Context


@pytest.fixture
def benchmarks(tmp_path):
    """Good files in the layouts of TRACE, the O-LoRA benchmark, and a table of two columns."""
    trace_files.write(tmp_path / "trace", rows=3)
    folder = tmp_path / "cl" / "SC" / "films"
    folder.mkdir(parents=True)
    (tmp_path / "cl" / "instruction_config.json").write_text('{"SC": [{"instruction": "Which?"}]}')
    (folder / "labels.json").write_text('["Good", "Bad"]')
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text('[{"label": "Good", "sentence": "fine"}]')
    known = {"Definition": ["Answer."], "Instances": [{"input": "Who?", "output": ["Me"]}]}
    (tmp_path / "ni" / "task1_who").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "ni" / "task1_who" / f"{split}.json").write_text(json.dumps(known))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("q,a\nWho?,Me\n")
    pq.write_table(pa.table({"q": ["Who?"], "a": ["Me"]}), tmp_path / "table.parquet")
    (tmp_path / "lines.jsonl").write_text('{"q": "Who?", "a": "Me"}\n')
    return tmp_path


def formats(folder):
    """A good `tasks` section of every format that reads files of the user's."""
    rendered = {"prompt": "{q}", "answer": "{a}"}
    one = {"name": "one", **rendered}
    return {
        "trace": {"path": folder / "trace"},
        "cl_benchmark": {"path": folder / "cl", "sequence": ["films"]},
        "super_ni": {"path": folder / "ni", "sequence": ["task1_who"]},
        "parquet": {"sequence": [{**one, "train": folder / "table.parquet"}]},
        "jsonl": {"sequence": [{**one, "train": folder / "lines.jsonl"}]},
        "huggingface": {"sequence": [{"path": folder / "table", "test": None, **rendered}]},
    }


def section(folder, format, **changes):
    found = {"format": format, **formats(folder)[format], **changes}
    return json.loads(json.dumps(found, default=str))


def test_the_good_files_of_every_format_pass(benchmarks):
    for format in formats(benchmarks):
        check_inputs(loading.validate({"tasks": section(benchmarks, format), "method": "solo"}))


@pytest.mark.parametrize(
    ("format", "file", "content", "said"),
    [
        ("trace", "trace/FOMC/train.json", b"[{", "FOMC/train.json, line 1: not JSON"),
        ("trace", "trace/FOMC/test.json", b"", "FOMC/test.json, line 1: not JSON"),
        ("trace", "trace/Py150/test.json", b"{}", "Py150/test.json: not a JSON list"),
        ("trace", "trace/Py150/test.json", b"[]", "Py150/test.json has no row with"),
        ("trace", "trace/Py150/test.json", b'["\xff"]', "test.json: not UTF-8"),
        ("trace", "trace/FOMC/train.json", b'[{"prompt": "a"}]', "row 1: no column 'answer'"),
        ("cl_benchmark", "cl/SC/films/train.json", b"[[]]", "train.json, row 1: a list"),
        ("cl_benchmark", "cl/SC/films/train.json", b"", "train.json, line 1: not JSON"),
        (
            "cl_benchmark",
            "cl/SC/films/test.json",
            b'[{"label": "Fair", "sentence": "so so"}]',
            "films/test.json, row 1: label 'Fair' is not in",
        ),
        ("cl_benchmark", "cl/SC/films/labels.json", b"{", "labels.json, line 1: not JSON"),
        ("cl_benchmark", "cl/instruction_config.json", b"{}", "no instruction"),
        (
            "super_ni",
            "ni/task1_who/train.json",
            b"[]",
            "train.json: a list, not a JSON object with",
        ),
        ("super_ni", "ni/task1_who/train.json", b"{}", "train.json: no column 'Definition'"),
        (
            "super_ni",
            "ni/task1_who/test.json",
            b'{"Definition": "Answer.", "Instances": [{"input": "Who?", "output": 0.5}, {}]}',
            "task1_who/test.json, instance 2: no column 'input'",
        ),
        (
            "super_ni",
            "ni/task1_who/test.json",
            b'{"Definition": "Answer.", "Instances": [{"input": "Who?", "output": [""]}]}',
            "task1_who/test.json has no row with",
        ),
        ("parquet", "table.parquet", b"PAR1", "table.parquet: not readable as Parquet"),
        ("parquet", "table.parquet", b"", "table.parquet: not readable as Parquet"),
        ("jsonl", "lines.jsonl", b"", "lines.jsonl has no row with prompt and answer"),
        ("jsonl", "lines.jsonl", b'{"q": "a", "a": "\xff"}', "lines.jsonl, line 1: not UTF-8"),
        ("jsonl", "lines.jsonl", b'{"q": "a", "a": null}', "line 1: 'a' is null, not text"),
        ("huggingface", "table/train.csv", b"", "table"),
        ("huggingface", "table/train.csv", b"q,a\n\xff,\xfe\n", "table"),
        ("huggingface", "table/train.csv", b"q,b\nWho?,Me\n", "row 1: no column 'a'"),
    ],
)
def test_a_malformed_file_is_named_and_nothing_is_written(
    refused, benchmarks, format, file, content, said
):
    (benchmarks / file).write_bytes(content)
    assert said in refused({"tasks": section(benchmarks, format), "method": "sequential"})


@pytest.mark.parametrize(
    ("format", "changes", "said"),
    [
        ("trace", {"sequence": ["FOMC", "Fomc"]}, "tasks.sequence.1: "),
        ("trace", {"order": 3}, "tasks.order: "),
        ("trace", {"path": "nowhere"}, "nowhere/C-STANCE/train.json"),
        ("cl_benchmark", {"sequence": ["films", "IMDB"]}, "no set 'IMDB' (there are films)"),
        ("cl_benchmark", {"path": "nowhere"}, "tasks.path: no instruction_config.json"),
        ("super_ni", {"sequence": ["task2"]}, "no task 'task2' (there are task1_who)"),
        (
            "super_ni",
            {"sequence": None},
            "tasks.path: no folder task1572_<what>, a task of order 1",
        ),
        ("super_ni", {"sequence": []}, "tasks.sequence: "),
        ("super_ni", {"order": 0}, "tasks.order: "),
        ("super_ni", {"count": 0}, "tasks.count: "),
        (
            "super_ni",
            {"path": "nowhere"},
            "tasks.path: no task<number>_<what>/train.json in",
        ),
        ("parquet", {"sequence": [{"name": "a", "train": "none.parquet"}]}, "none.parquet"),
        ("jsonl", {"sequence": [{"path": "nowhere"}]}, "tasks.sequence: no folder"),
        ("jsonl", {"sequence": [{"path": __file__}]}, "test_cli_tasks.py; give a file as train"),
        ("huggingface", {"sequence": [{"path": __file__}]}, "a file; format huggingface takes"),
        ("jsonl", {"sequence": [{"path": "a", "train": "b"}]}, "either path or train"),
        ("jsonl", {"sequence": [{"train": "b"}]}, "tasks.sequence.0.name"),
        ("jsonl", {"prompt": "{q"}, "tasks.prompt: "),
        ("huggingface", {"sequence": [{"path": "no body/at all"}]}, "no body/at all"),
        ("huggingface", {"chat_template": True}, "tasks.chat_template: "),
        ("huggingface", {"layout": "chatml"}, "tasks.layout: "),
        ("jsonl", {"layout": "alpaca", "prompt": "{q}"}, "tasks.prompt: layout alpaca has no temp"),
        ("jsonl", {"layout": "alpaca"}, "tasks.sequence.0.prompt: layout alpaca has no templates"),
        ("jsonl", {"truncate": "right"}, "tasks.truncate: "),
    ],
)
def test_a_bad_task_section_is_one_line_and_nothing_is_written(
    refused, benchmarks, format, changes, said
):
    tasks = section(benchmarks, format, **changes)
    assert said in refused({"tasks": tasks, "method": "sequential"})


ASKED, SAID = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}


def conversations(file, *talks, **changes):
    """A `tasks` section of a file of messages."""
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return {"format": "messages", "sequence": [{"name": "one", "train": str(file)}], **changes}


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        ([ASKED], "talks.jsonl, line 2: no assistant message"),
        ([SAID], "talks.jsonl, line 2: the first turn is the assistant's"),
        ([ASKED, {"role": "bot", "content": "Me"}], "line 2, message 2: role must be one of"),
        ([ASKED, {"role": "assistant", "content": 5}], ""),
        ([ASKED, {"role": "assistant", "content": ["Me"]}], "line 2, message 2: a part of the"),
        (
            [{"role": "system", "content": "Be brief."}, ASKED, SAID],
            "line 2: the chat template of {folder} cannot render the messages: no system",
        ),
        (
            [ASKED, SAID] * 2,
            "line 2: the chat template of {folder} renders the messages before message 3 dif",
        ),
    ],
)
def test_a_bad_conversation_is_named_and_nothing_is_written(
    request, benchmarks, tmp_path, talk, said
):
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{{ m.role + '\n' }}{% if m.role == 'user' or loop.last %}"
        "{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    folder = chat.folder(tmp_path / "model", template=template)
    tasks = conversations(benchmarks / "talks.jsonl", [ASKED, SAID], talk)
    config = {"tasks": tasks, "method": "sequential", "model": {"path": str(folder)}}
    if not said:  # A number is text, as everywhere.
        check_inputs(loading.validate(config))
        return
    assert said.format(folder=folder) in request.getfixturevalue("refused")(config)


def test_messages_need_a_chat_template(refused, benchmarks, tmp_path):
    tasks = conversations(benchmarks / "talks.jsonl", [ASKED, SAID])
    said = refused({"tasks": tasks, "method": "sequential"})
    assert "talks.jsonl, line 1: messages need a chat template" in said
    folder = chat.folder(tmp_path / "model", template=None)
    said = refused({"tasks": tasks, "method": "sequential", "model": {"path": str(folder)}})
    assert f"talks.jsonl, line 1: the tokenizer in {folder} has no chat template" in said


def test_a_format_that_is_a_layout_takes_no_other(refused, benchmarks):
    tasks = conversations(benchmarks / "talks.jsonl", [ASKED, SAID], layout="alpaca")
    said = refused({"tasks": tasks, "method": "sequential"})
    assert "tasks.layout: format messages is a layout itself; leave it out" in said


def test_marks_and_colours_show_which_tokens_carry_loss():
    tokenizer = chat.tokenizer()
    row = messages.row_of(chat.MESSAGES, None, "x")
    [encoded] = encoded_rows(encode(tokenizer, [row]))
    shown = _example(_parts(encoded, tokenizer))
    assert "assistant\n»In Rome.<|im_end|>«\n<|im_start|>user" in shown.plain
    assert shown.plain.endswith("assistant\n»In München.<|im_end|>«")
    green = [shown.plain[span.start : span.end] for span in shown.spans if span.style == "green"]
    assert [text.strip() for text in green] == [
        "In Rome.<|im_end|>",
        "Since 2019.\n<|im_end|>",
        "In München.<|im_end|>",
    ]


def in_process(sessions, folder, resources, record, console):
    """Runs sessions without Ray, which `tests/pipeline` starts for prepare stages often enough."""
    assert not resources.gpus_per_worker, "Ray would refuse to start without GPUs"
    for session in sessions:
        run_stages(session.stages, Context(ray_data=False), record)
    return []


def test_tasks_shows_counts_and_examples_and_a_run_finds_them_prepared(
    benchmarks, capsys, monkeypatch
):
    """Also of a config for GPUs, where there is none."""
    monkeypatch.setattr("jobs.tasks.run_with_progress", in_process)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    rows = [{"q": f"Who is {i}?", "a": f" Me, [{i}]"} for i in range(9)]
    lost = [{"q": "Who? " * 300, "a": "Me"}, {"q": "", "a": "Me"}]
    (benchmarks / "lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows + lost))
    file = benchmarks / "config.yaml"
    tasks = section(benchmarks, "jsonl", max_length=100)
    storage = benchmarks / "storage"
    config = {"method": "sequential", "tasks": tasks, "storage": str(storage)}
    file.write_text(json.dumps({**config, "resources": {"gpus_per_worker": 1}}))
    assert cli.main(["tasks", str(file)]) == cli.OK
    shown = capsys.readouterr().out
    counts = next(line.split() for line in shown.splitlines() if line.startswith(" one"))
    assert [counts[i] for i in (0, 1, 2, 6, 7)] == ["one", "train", "9", "1", "1"]
    assert (
        "one: 2 of 11 train rows left out: 1 longer than tasks.max_length or the "
        "model allows, 1 without prompt or "
        "answer"
    ) in shown
    for i in (0, 4, 8):
        assert f"Who is {i}?» Me, [{i}]<end>«" in shown
    assert [path.name for path in storage.iterdir()] == ["stages"]
    assert cli.main(["plan", str(file), "--formula-only"]) == cli.OK
    planned = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in planned if "prepare/one" in line] == ["done"]
    made = sorted((storage / "stages").iterdir())
    for scorer in ("exact_match", "rouge_l"):
        assert cli.main(["tasks", str(file), f"tasks.scorer={scorer}"]) == cli.OK
        assert f"one: scored by {scorer}" in capsys.readouterr().out
    assert sorted((storage / "stages").iterdir()) == made


@pytest.mark.parametrize("place", ["tools", "calls"])
def test_the_longest_row_may_have_short_words_and_long_tools(tmp_path, place):
    folder = chat.folder(tmp_path / "model")
    asked, said = {"role": "user", "content": "Who? " * 9}, {"role": "assistant", "content": "Me"}
    rows = [{"messages": [asked, said]}] * 20
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(9)]
    short = {"role": "user", "content": "?"}
    calls = [{"function": each["function"] | {"arguments": {}}} for each in tools]
    long = {"tools": [short, said], "calls": [short, said | {"tool_calls": calls}]}[place]
    rows += [{"messages": long, "tools": tools if place == "tools" else []}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"format": "messages", "sequence": [{"name": "a", "train": str(file)}]}
    raw = {"method": "sequential", "model": {"path": str(folder)}}
    config = loading.validate({**raw, "tasks": {**tasks, "max_length": 5000}})
    row = messages.row_of(rows[-1]["messages"], rows[-1]["tools"], "")
    [last] = encoded_rows(encode(chat.tokenizer(), [row]))
    assert longest_row(config)[0] == min(512, len(last.input_ids))
