"""A task larger than the memory that is there."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOKENS, TOKENS_A_ROW = 20_000_000, 1500
CAP = 3_000_000_000
"""Of anonymous memory a process; torch, Ray and transformers alone take half a gigabyte."""
WORDS = "the of river city mountain people water light between number question answer".split()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_twenty_million_tokens_are_prepared_under_a_cap_in_memory_that_does_not_grow(tmp_path):
    def prepared(tokens):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        draw = random.Random(0)
        with (folder / "rows.jsonl").open("w") as file:
            for _ in range(tokens // TOKENS_A_ROW):
                prompt = " ".join(draw.choices(WORDS, k=400))
                file.write(json.dumps({"prompt": prompt, "answer": " so"}) + "\n")
        script = ROOT / "tests" / "reference" / "prepare_in_little_memory.py"
        command = [sys.executable, str(script), str(folder / "rows.jsonl"), str(folder), str(CAP)]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=900,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        print(found)
        assert found["rows"] == tokens // TOKENS_A_ROW
        return found

    half, whole = prepared(TOKENS // 2), prepared(TOKENS)
    assert whole["tokens"] >= TOKENS
    # As Python's integers in lists alone they would take 36 bytes a token.
    assert whole["largest"] < 1.5e9
    assert whole["largest"] < 1.2 * half["largest"]
