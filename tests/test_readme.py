"""The README's Python code runs as it stands, and tables of all pages are tables."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agcl.model import models
from agcl.model.builtin import builtin_model, builtin_tokenizer
from agcl.tasks import facts

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for folder in (".", "agcl", "pipeline", "jobs")
    for page in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)


def test_the_trainer_example_runs_and_protects(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    folder = tmp_path / "models" / "my-llama"
    rows = facts.base(entities=8, seed=0).splits["train"]()
    tokenizer = builtin_tokenizer(f"{row.prompt}{row.answer}" for row in rows)
    models.save(builtin_model(len(tokenizer), seed=0), tokenizer, folder)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(compile(code, "README.md", "exec"), found)
    before = load_file(folder / "model.safetensors")
    bases = found["basis"]
    moved = {name: p.detach().cpu() - before[name] for name, p in found["model"].named_parameters()
             if name in bases}  # fmt: skip
    assert all(step.norm() > 0 for step in moved.values())
    leaks = [(step @ bases[name]).norm() / step.norm() for name, step in moved.items()]
    assert torch.stack(leaks).max() < 1e-3
    frozen = [n for n, p in found["model"].named_parameters() if n not in bases]
    assert all(
        torch.equal(found["model"].get_parameter(n), before[n]) for n in frozen if n in before
    )
    assert (tmp_path / "base.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_table_has_the_line_below_its_head(page):
    """Without it, or with its rows wrapped, a table is shown as text."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    in_code, before = False, ""
    for number, line in enumerate(lines, start=1):
        in_code ^= line.strip().startswith("```")
        is_row = line.lstrip().startswith("|") and not in_code
        if is_row and not before.lstrip().startswith("|"):
            assert re.fullmatch(r"\s*\|[\s|:-]+\|\s*", lines[number]), f"{page}:{number}"
        before = line
