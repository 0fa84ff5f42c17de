"""The final model as `mlflow.transformers.load_model` and `mlflow models serve` open it.

Written here and not by `mlflow.transformers.save_model`, which in MLflow 3.17 fails on a folder
with transformers 5, and would copy the weights once more.
"""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from agcl.model import adapter, models

_FLAVOR, _TASK, _PIPELINE = "transformers", "text-generation", "TextGenerationPipeline"
_MODEL, _PEFT, _TOKENIZER = "model", "peft", "components/tokenizer"
_PACKAGES = ("mlflow", "transformers", "torch", "accelerate")
_DEFAULTS = {"max_new_tokens": 256, "do_sample": False, "return_full_text": False}
"""Parameters of a served model: it answers greedily, as agcl scores, without the prompt."""


def write_flavor(folder: Path, base: Path, target: Path, *, run_id: str, model_id: str) -> None:
    """Write an MLflow model of a final model's folder. Weights are links, and are not read.

    An adapter alone refers to its base as PEFT's config names it: a model on the hub at its commit,
    or a folder, which must exist where the model is loaded. `base` has the base model's
    `config.json`.
    """
    from mlflow import pyfunc
    from mlflow.models import Model

    alone = (folder / adapter.CONFIG).is_file()
    _link([*folder.iterdir()], target / (_PEFT if alone else _MODEL))
    tokenizer = models.load_tokenizer(folder)
    tokenizer.save_pretrained(target / _TOKENIZER)
    config = json.loads(((base if alone else folder) / "config.json").read_text(encoding="utf-8"))
    of_folder = {"model_binary": _MODEL, "source_model_name": folder.name}
    model = Model(run_id=run_id, model_id=model_id, signature=_signature())
    model.add_flavor(
        _FLAVOR,
        transformers_version=version("transformers"),
        task=_TASK,
        instance_type=_PIPELINE,
        pipeline_model_type=config["architectures"][0],
        components=["tokenizer"],
        tokenizer_type=type(tokenizer).__name__,
        **(_on_base(folder) if alone else of_folder),
    )
    pyfunc.add_to_model(
        model,
        loader_module="mlflow.transformers",
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        model_config=_DEFAULTS,
    )
    model.model_size_bytes = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    model.save(str(target / "MLmodel"))
    _write_environment(target, [*_PACKAGES, *([_PEFT] if alone else [])])


def _link(files: Sequence[Path], target: Path) -> None:
    target.mkdir(parents=True)
    for file in files:
        (target / file.name).symlink_to(file.resolve())  # MLflow copies what it points to.


def _on_base(folder: Path) -> dict[str, Any]:
    """The keys by which MLflow finds an adapter and its base, from PEFT's config."""
    config = json.loads((folder / adapter.CONFIG).read_text(encoding="utf-8"))
    name, revision = config["base_model_name_or_path"], config.get("revision")
    found = {"source_model_name": name, "peft_adaptor": _PEFT}
    if not revision:
        return {**found, "local_base_model_path": name}
    of_tokenizer = {"tokenizer_name": name, "tokenizer_revision": revision}
    return {**found, "source_model_revision": revision, **of_tokenizer}


def _signature() -> Any:
    """Texts to texts, with the most new tokens as a parameter of each request."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    most = ParamSpec("max_new_tokens", "long", _DEFAULTS["max_new_tokens"])
    text = Schema([ColSpec("string")])
    return ModelSignature(text, text, ParamSchema([most]))


def _write_environment(target: Path, packages: Sequence[str]) -> None:
    """What `mlflow models serve` installs: the packages that are needed, at today's versions."""
    pinned = []
    for name in packages:
        try:
            pinned.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue  # accelerate is optional.
    python = platform.python_version()
    conda = [f"python={python}", "pip", {"pip": pinned}]
    environment = {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": conda}
    virtual = {"python": python, "dependencies": ["-r requirements.txt"]}
    (target / "requirements.txt").write_text("\n".join(pinned) + "\n", encoding="utf-8")
    for name, content in (("conda.yaml", environment), ("python_env.yaml", virtual)):
        (target / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
