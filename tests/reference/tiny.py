"""Tiny models and rows, built in code, the same in every process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from agcl.lrp import RuleSet, relevance_backward
from agcl.scoring.evaluate import predict
from agcl.tasks import Encoded, Rows

VOCABULARY, END = 40, 1


def llama(
    *,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    attention: str = "sdpa",
    layers: int = 2,
    width: int = 16,
    spread: float = 0.3,
    dropout: float = 0.0,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A random Llama with four query heads in eval mode, without special weight values."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width + width // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=spread,
        attention_dropout=dropout,
        tie_word_embeddings=False,
        attn_implementation=attention,
        rms_norm_eps=1e-3,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=END,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for module in norms(model):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.to(dtype).eval()


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]


def with_exact_norms(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Compute norms in the model's precision; transformers computes them in float32."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    for module in norms(model):
        module.forward = MethodType(forward, module)
    return model


@torch.no_grad()
def answered_rows(
    model: LlamaForCausalLM, count: int, *, wrong: tuple[int, ...] = (), seed: int = 0
) -> list[Encoded]:
    """Rows of several lengths, answered with the model's own greedy tokens.

    Answers of rows in `wrong` end with a token that the model does not predict.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = torch.randint(2, VOCABULARY, (3 + index % 4,), generator=generator).tolist()
        prompt_tokens = len(ids)
        for _ in range(1 + index % 3):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if index in wrong:
            ids[-1] = (ids[-1] + 1) % VOCABULARY
        rows.append(Encoded(ids, prompt_tokens))
    return rows


def random_rows(count: int, *, seed: int = 0) -> list[Encoded]:
    """Prompts of several lengths with random answers of one or two tokens and an end token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = 4 + index % 5
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Encoded([*ids, END], length - 1 - index % 2))
    return rows


@contextmanager
def explained(
    model: LlamaForCausalLM, rules: RuleSet = "attnlrp"
) -> Iterator[Callable[[], Tensor]]:
    """`relevance_backward`; yields a function for every input token's relevance, (rows, tokens)."""
    embedded: list[Tensor] = []
    with relevance_backward(model, rules):
        handle = model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: embedded.append(output)
        )
        try:
            yield lambda: (embedded[-1] * embedded[-1].grad).sum(-1)
        finally:
            handle.remove()


def exact_match(model: nn.Module, rows: Rows | Sequence[Encoded], **options: int) -> list[bool]:
    """Whether each row is answered exactly, in row order. Collective."""
    predicted = predict(model, rows, **options)
    return [ids == rows[i].input_ids[rows[i].prompt_tokens :] for i, ids in enumerate(predicted)]
