"""Tiny Trainers, protections for tiny models, and what is left of them in a trained one."""

import torch
from reference import tiny
from transformers import Trainer, TrainingArguments

from agcl.integrations.transformers import gated_adamw
from agcl.lrp import attributed_linears, stored_transposed
from agcl.tasks.batches import IGNORED, shuffled

ROWS = tiny.random_rows(16)


class Padded:
    """A collator that pads as agcl does; DataCollatorForSeq2Seq needs a tokenizer."""

    def __call__(self, rows):
        width = max(len(row["input_ids"]) for row in rows)
        padded = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
        for row in rows:
            row["attention_mask"] = [1] * len(row["input_ids"])
        return {
            key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])
            for key, value in padded.items()
        }


def dataset(rows=ROWS, *, seed=0, epochs=1):
    """Rows in the order in which agcl trains on them."""
    return [
        {"input_ids": rows[i].input_ids,
         "labels": [IGNORED] * rows[i].prompt_tokens + rows[i].input_ids[rows[i].prompt_tokens :]}
        for epoch in range(epochs)
        for batch in shuffled(len(rows), 8, seed=seed, epoch=epoch)
        for i in sorted(batch, key=lambda i: len(rows[i].input_ids))
    ]  # fmt: skip


def arguments(folder, **changes):
    settings = {
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "linear",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def trainer(model, folder, rows=None, *, callbacks=(), protected=None, optimizers=None, **changes):
    args = arguments(folder, **changes)
    options = {"optimizers": optimizers} if optimizers else {}
    if protected:
        options["optimizer_cls_and_kwargs"] = gated_adamw(args, **protected)
    made = Trainer(
        model,
        args,
        train_dataset=rows or dataset(epochs=2),
        data_collator=Padded(),
        callbacks=list(callbacks),
        **options,
    )
    return made


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def basis_of(model, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    turned = stored_transposed(model)
    return {
        name: torch.linalg.qr(
            torch.randn(layer.weight.shape[name not in turned], count, generator=generator)
        )[0]
        for name, layer in attributed_linears(model).items()
    }


def gate_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    linears = attributed_linears(model).items()
    return {n: torch.rand(layer.weight.shape, generator=generator) for n, layer in linears}


def leak(before, after, basis, transposed=()):
    """The largest share of a weight's change that lies in its protected directions."""
    shares = []
    for name, u in basis.items():
        step = after[name] - before[name]
        step = step.T if name in transposed else step
        shares.append(float((step @ u).norm() / step.norm()))
    return max(shares)
