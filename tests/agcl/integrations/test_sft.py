"""TRL's SFTTrainer, where it is installed."""

import copy

import pytest
import torch
from datasets import Dataset
from reference import tiny
from reference.trainers import ROWS, arguments, basis_of, dataset, leak, weights
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agcl.integrations.transformers import Protect, gated_adamw
from agcl.modulation import GatedAdamW
from agcl.train import train_task

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", ["callback", "optimizer"])
def test_it_equals_agcls_own_training_on_the_same_rows_in_order(tmp_path, way):
    trl = pytest.importorskip("trl")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
    own, start = tiny.llama(), tiny.llama()
    basis = basis_of(own)
    args = trl.SFTConfig(
        **{**arguments(tmp_path).to_dict(), "weight_decay": 0.0, "bf16": False},
    )
    options = {"callbacks": [Protect(basis=basis)]}
    if way == "optimizer":
        options = {"optimizer_cls_and_kwargs": gated_adamw(args, basis=basis)}
    made = trl.SFTTrainer(
        copy.deepcopy(start), args, train_dataset=Dataset.from_list(dataset(epochs=2)),
        processing_class=tokenizer, **options,
    )  # fmt: skip
    made.train()
    train_task(
        own, ROWS, GatedAdamW(own.named_parameters(), lr=1e-2, weight_decay=0.0, basis=basis),
        epochs=2, batch_size=8, micro_batch_size=4, seed=0, schedule="linear",
    )  # fmt: skip
    found = weights(made.model)
    for name, weight in weights(own).items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)
    assert leak(weights(start), found, basis) < 1e-4
