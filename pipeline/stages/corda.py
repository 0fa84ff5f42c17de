"""CorDA: what an adapter starts from, decomposed once from the base model and general text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agcl.model import adapter, corda
from agcl.parallel import distributed
from agcl.tasks import TRAIN, EncodedRows, Rows, sample
from torch.utils.data import ConcatDataset

from pipeline.config import hub
from pipeline.stages.context import Context
from pipeline.stages.files import ADAPTER, named, rows_file


def decompose(
    config: Mapping[str, Any], inputs: Mapping[str, Path], out_dir: Path, context: Context
) -> None:
    """Write the initial adapter, computed from the texts of all `rows/...`.

    It does not change `model`'s outputs yet. PEFT reads the texts one by one, so rank 0 does all
    the work and the other ranks wait.
    """
    parts: list[Any] = [
        EncodedRows(folder / rows_file(TRAIN)) for folder in named("rows/", inputs).values()
    ]
    rows: Rows = ConcatDataset(parts)
    chosen = sample(len(rows), config["samples"], seed=config["seed"])
    size = {"rank": config["rank"], "alpha": config["alpha"]}
    with context.borrowed_model(inputs, config) as model:
        if context.is_rank_zero:
            factors = corda.decompose(
                model,
                [rows[index].input_ids for index in chosen],
                **size,
                log=lambda done: context.log({"texts": done, "of_texts": len(chosen)}, done),
            )
            folder = inputs["model"]
            base = hub.name_of(folder) or (folder,)
            settings = adapter.lora_config(model, **size)
            corda.write(settings, factors, factors, out_dir / ADAPTER, *base)
        distributed.meet()
