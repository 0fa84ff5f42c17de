"""The config sections that are the same for every method: training and evaluation."""

from typing import Literal

from agcl.schedule import Schedule
from pydantic import Field, model_validator

from pipeline.config.section import Place, Positive, Precision, Section, Share


class Training(Section):
    """How each task is trained. Every task starts with a new optimizer."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    """`adamw_8bit` keeps AdamW's two running means in one byte each instead of four, quantized by
    blocks; not with `resources.shard_model`. `sgd` is for comparisons: with it a gate on the
    gradient scales the whole step, which under Adam cancels. Needs a learning rate hundreds of
    times higher."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of `sgd`; other optimizers ignore it."""
    schedule: Schedule = "constant"
    """Learning rate over the steps of each task: `constant`, or decaying to 0, `linear` or as half
    a `cosine`."""
    warmup: Share = 0.0
    """Share of each task's steps in which the learning rate rises from 0."""
    epochs: Positive = 8
    """Passes over each task's training rows."""
    batch_size: Positive = 16
    """Rows per optimizer step, over all workers."""
    max_tokens: Positive = 8192
    """Maximum tokens per forward pass of a worker, padding included; a longer row is alone. Sets
    how much memory activations take. Workers take a batch's micro-batches in turn, so with W
    workers keep it below a W-th of a batch. Changes results by rounding only."""
    micro_batch_size: Positive | None = None
    """Maximum rows per forward pass as well; null: as many as `max_tokens` allow."""
    weight_decay: float = Field(0.01, ge=0)
    max_gradient_norm: float = Field(1.0, gt=0)
    precision: Precision = "float32"
    """`bfloat16` means autocast; weights and optimizer state stay as `model.dtype` has them."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How steps are rounded into weights of `model.dtype: bfloat16`; no effect on others, nor with
    an adapter or a subspace, whose factors are float32. `stochastic`: up or down by chance, from
    the seed, so that small steps count in expectation; the optimizer state is float32. `nearest`
    loses steps below about 1/500 of a weight, and cannot be combined with `protect`."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: about a third more time, and memory
    for the activations of one layer instead of all. Does not change results."""
    packing: bool = False
    """Concatenate a micro-batch's rows instead of padding them to the longest; rows do not attend
    to each other. Faster for large micro-batches with rows of different lengths. Changes results
    by rounding only. Not with `model.attention: flash_attention_2`."""
    compile: bool = False
    """Train with `torch.compile`, which needs a C++ compiler. Compiling takes half a minute or more
    and saved up to 6 % per step of a 135M model on a CPU, so it pays off for tasks of hundreds of
    steps. Changes results by rounding only."""


class Evaluation(Section):
    """How tasks are scored: greedy decoding, then each task's scorer."""

    batch_size: Positive = 64
    precision: Precision = "float32"
    rows: Literal["all", "validation"] = "all"
    """Score all rows, or only the validation rows, as the trials of a search do."""
    set: str | None = None
    """Evaluation set of the headline metrics; null takes the first one of the format."""
    scorers: tuple[str, ...] = ()
    """Additional scorers for all tasks: names in `agcl/scoring/scorers.py`, or
    `package.module:function`. Each adds an evaluation set such as `test-rouge_l`."""
    max_new_tokens: Positive | None = None
    """Maximum length of decoded text, for scorers that need text; null takes the length of the
    longest expected answer."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of rows held out for choosing settings; the test metrics leave them out. It is a share
    of the training rows, which are then not trained on (if a task has a validation split, that is
    used instead), or of the scored rows for tasks that are scored on their training rows."""
    text: Place | None = None
    """Text file (UTF-8) to measure the language-model loss on, before and after every task: what
    training costs the model's other skills. Where the tokenizer starts texts with BOS, each window
    of 512 tokens begins with it."""
    text_tokens: int = Field(20_000, ge=2)
    """Maximum tokens, from the beginning of the text."""
    probes: tuple[Place, ...] = ()
    """Files of multiple-choice questions, to measure general skills before and after every task as
    lm-evaluation-harness does: JSON Lines of `{"context": ..., "choices": [...], "answer": index}`.
    A probe is called by its file's name without extension. Not scored in a search's trials."""
    probe_rows: Positive | None = 500
    """Maximum questions per probe, the same random ones every time; null takes all."""

    @model_validator(mode="after")
    def _consistent(self) -> "Evaluation":
        if self.rows == "validation" and not self.validation:
            raise ValueError("validation: required if rows is validation")
        names = [file.stem for file in self.probes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"probes: two files are called {name!r}; rename one")
        functions = [scorer.rpartition(":")[2] for scorer in self.scorers]
        for name in functions:
            if functions.count(name) > 1:
                raise ValueError(f"scorers: two are called {name!r}, as their scores would be")
        return self
