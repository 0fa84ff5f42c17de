"""What of a user's code results depend on."""

import sys

import pytest

from pipeline.config.scorer_files import source_files
from pipeline.plan.plan import plan
from pipeline.plan.stage import resolve


@pytest.fixture
def package(tmp_path, monkeypatch):
    files = {
        "own_a/__init__.py": "",
        "own_a/score.py": "import json, torch\nfrom agcl.metrics import summary\n"
        "from . import words\nfrom own_b import helper\n"
        "def exact(prediction, reference):\n    return float(prediction == reference)\n",
        "own_a/words.py": "",
        "own_a/unused.py": "",
        "own_b.py": "import own_a.words\ndef helper(): ...\n",
    }
    for name, text in files.items():
        file = tmp_path / "code" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield tmp_path / "code"
    for name in [name for name in sys.modules if name.startswith(("own_a", "own_b"))]:
        del sys.modules[name]


def test_a_function_depends_on_its_module_and_on_what_that_imports(package):
    found = source_files("own_a.score:exact")
    assert {name: file.relative_to(package).as_posix() for name, file in found.items()} == {
        "own_a": "own_a/__init__.py",
        "own_a.score": "own_a/score.py",
        "own_a.words": "own_a/words.py",
        "own_b": "own_b.py",
    }


@pytest.mark.parametrize("file", ["own_a/score.py", "own_b.py"])
@pytest.mark.parametrize("place", ["task", "config"])
def test_an_edited_scorer_is_scored_with_again(package, tiny_config, tmp_path, file, place):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    task = f"{{format: jsonl, sequence: [{{name: a, train: {tmp_path / 'rows.jsonl'}}}]}}"
    own = "own_a.score:exact"
    scorer = f"tasks.scorer={own}" if place == "task" else f'evaluation.scorers=["{own}"]'
    config = tiny_config(tmp_path, f"tasks={task}", scorer)

    def fingerprints():
        return {n: s.fingerprint for n, s in resolve(plan(config).stages, config.storage).items()}

    before = fingerprints()
    with (package / file).open("a") as source:
        source.write("# edited\n")
    after = fingerprints()
    changed = {name.partition("/")[0] for name in before if before[name] != after[name]}
    assert changed == {"evaluate", "report"}
