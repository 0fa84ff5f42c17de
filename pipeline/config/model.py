"""The config's section `model`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config import hub
from pipeline.config.section import Positive, Section, absolute

_BUILTIN = "builtin"


def _model_place(path: str) -> str:
    if path == _BUILTIN:
        return path
    folder = absolute(Path(path))
    return path if hub.is_id(path) and not folder.is_dir() else str(folder)


class Pretraining(Section):
    """How the built-in model learns generic facts before the sequence."""

    entities: Positive = 120
    """People in the generic facts, four facts each."""
    epochs: Positive = 16
    learning_rate: float = Field(2e-3, gt=0)
    batch_size: Positive = 32


class Model(Section):
    """The model to train."""

    path: Annotated[str, AfterValidator(_model_place)] = _BUILTIN
    """`builtin`, the folder of a Hugging Face causal language model in safetensors, or the id of
    one on the hub, `org/name` (a folder of that name wins). Of the hub, only safetensors, configs
    and tokenizer files are downloaded, into Hugging Face's own cache; `HF_TOKEN`, `HF_HUB_OFFLINE`
    and `HF_HOME` mean what they always mean. A worker whose machine's cache lacks the model
    downloads it with the `HF_TOKEN` of that machine."""
    revision: str | None = Field(None, pattern=r"^[^\s@]+(@[0-9a-f]{40})?$", max_length=300)
    """Branch, tag or commit on the hub; null is `main`. It is resolved to a commit once, before any
    work, and written to the run's `config.yaml` as `main@COMMIT`. Rerunning the command in the same
    folder keeps that commit even if the branch has moved, so an interrupted run resumes with the
    weights it started with; another `name` uses the branch's current commit."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Dtype of the weights in memory; `auto` is that of the model's `config.json`. bfloat16 halves
    the memory of weights and gradients: 12 instead of 16 bytes per trained weight, optimizer state
    included. Then `training.rounding` sets how small steps are rounded, protection holds up to
    rounding, and attribution uses a float32 copy unless `importance.precision` is bfloat16. An
    adapter's factors stay float32 on bfloat16 weights. To keep float32 weights and compute in
    bfloat16, set `training.precision`. The final model is saved in the base model's dtype, in a
    bucket in the dtype that it was trained in."""
    quantization: Literal["nf4"] | None = None
    """`nf4` keeps the linear layers' weights in four bits (bitsandbytes, pip install
    'agcl[quantization]'), computed in `dtype`: for an adapter that is not merged."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Implementation of attention in transformers; `flash_attention_2` needs a GPU, half precision
    and the package `flash_attn`; importance is measured without it. Changes results by
    rounding only."""
    pretraining: Pretraining = Pretraining()
    """For `builtin` only."""

    @model_validator(mode="after")
    def _fitting(self) -> "Model":
        if self.revision and not self.on_hub:
            raise ValueError(
                f"revision: only for models on the hub; {self.path} is "
                f"{'the built-in model' if self.is_builtin else 'a folder'}"
            )
        for key in ("dtype", "attention", "quantization"):
            if self.is_builtin and getattr(self, key) != Model.model_fields[key].default:
                raise ValueError(f"{key}: the builtin model has float32 weights and sdpa")
        return self

    @property
    def is_builtin(self) -> bool:
        """Whether this is the built-in model."""
        return self.path == _BUILTIN

    @property
    def on_hub(self) -> bool:
        """Whether this is a model on the Hugging Face hub."""
        return hub.is_id(self.path)

    @property
    def folder(self) -> Path:
        """The folder of a model that is not built in; in the cache for one on the hub.

        Raises `ValueError` for a revision that was not resolved to a commit yet.
        """
        if not self.on_hub:
            return Path(self.path)
        _, commit = hub.parts(self.revision)
        if commit is None:
            raise ValueError(f"model.revision: {self.path} has no commit yet")
        return hub.folder_of(self.path, commit)

    @property
    def identity(self) -> str | None:
        """What stands for the files of a model on the hub in fingerprints; None for a folder."""
        return f"hub:{self.path}@{hub.parts(self.revision)[1]}" if self.on_hub else None
