"""A task of six questions, and base folders of any family to learn it."""

import torch
from reference import families

from agcl.model import models
from agcl.model.builtin import builtin_tokenizer

CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
QUESTIONS = [f"What is {i} and {i + 30}?" for i in range(6)]
ANSWERS = [f" the number {31 * i}" for i in range(6)]


def tokenizer():
    """A plain byte-level tokenizer, which merges digits."""
    texts = [q + a for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    made = builtin_tokenizer(texts * 4, vocab_size=300)
    made.chat_template = CHAT
    return made


def model(architecture, dtype=torch.float32, more_tokens=0, **config):
    """A tiny model of the family that embeds the tokenizer's tokens, and more."""
    sizes = {"vocab_size": len(tokenizer()) + more_tokens, "hidden_size": 32}
    sizes |= {"initializer_range": 0.1, "eos_token_id": 0}
    return families.model(architecture, dtype=dtype, **{**sizes, **config})


def base_folder(folder, architecture, dtype=torch.float32):
    """The model beside the tokenizer."""
    models.save(model(architecture, dtype), tokenizer(), folder)
    return folder
