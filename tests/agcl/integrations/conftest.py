"""Fixtures for tests that start a `Trainer`."""

import gc
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(autouse=True, scope="package")
def few_objects() -> Iterator[None]:
    """Every Trainer collects garbage before it trains: among all imports that takes most of its
    time here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of forty words, one token each."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w0")
