"""The examples in jobs/examples run, in an environment with nothing but the library."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from reference import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agcl.modulation import load_bases

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs" / "examples" / "fine_tune_with_trainer.py"
WITHOUT_THE_PIPELINE = '''
import importlib, pkgutil, runpy, sys
from importlib.machinery import PathFinder

class Library(PathFinder):
    """Finds what is installed, but for these, as if they were not."""
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in ("ray", "mlflow", "pydantic", "pipeline"):
            return super().find_spec(name, path, target)

sys.meta_path = [Library if each is PathFinder else each for each in sys.meta_path]
import agcl
for module in pkgutil.walk_packages(agcl.__path__, "agcl."):
    importlib.import_module(module.name)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
'''


@pytest.mark.slow
def test_fine_tuning_with_a_trainer_needs_neither_ray_nor_mlflow(tmp_path):
    assert len(SCRIPT.read_text().splitlines()) <= 43
    model, data, out = tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out"
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As Llama's and Mistral's: without a token to pad with.
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(model)
    tiny.llama().save_pretrained(model)
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": f" w{i + 2}"} for i in range(2, 9)]
    rows.append({"text": "w5\u2028w6"})
    written = (json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
    data.write_text("\ufeff" + "".join(written), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PIPELINE, SCRIPT, model, data, out],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (loss, kl), (later_loss, later_kl) = (
        (float(each) for each in found)
        for found in re.findall(r"^loss and KL .*\((.*), (.*)\)", done.stdout, re.MULTILINE)
    )
    assert kl < 1e-6 < later_kl
    assert loss != later_loss
    assert "not protected" not in done.stderr
    assert {"model.safetensors", "tokenizer.json"} <= {file.name for file in out.iterdir()}
    # Any other would be taken for weights.
    assert [file.name for file in out.glob("*.safetensors")] == ["model.safetensors"]
    assert len(load_bases(tmp_path / "base.safetensors")) == 14


WITHOUT_THE_EXTRA = """
import sys
from importlib.machinery import PathFinder
class Library(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in ("ray", "mlflow", "pydantic"):
            return super().find_spec(name, path, target)
sys.meta_path = [Library if each is PathFinder else each for each in sys.meta_path]
from jobs.cli import main
sys.exit(main(["methods"]))
"""


def test_the_library_alone_says_what_the_command_needs():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_EXTRA],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = "agcl: no module ray; pip install 'agcl[pipeline]'\n"
    assert (done.returncode, done.stderr) == (2, said)
