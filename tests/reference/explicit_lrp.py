"""Layer-wise relevance propagation of a Llama, slow and explicit: the oracle of `agcl.lrp`.

One row at a time, in float64: a separate forward pass stores the activations, then relevance itself
(never a gradient) is redistributed layer by layer. A linear layer sends explicit messages
`W_ji x_i / z_j R_j`; their sum over outputs is the input's relevance, their sum over tokens the
weight's relevance.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Explanation:
    target: float = 0.0
    """Sum of the explained logits."""
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Relevance of every input token."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Relevance of every entry of a linear layer's weight, summed over tokens."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """(tokens, in) per linear layer."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """(tokens, out) per linear layer: relevance arriving at its output."""

    def linear(self, name: str, weight: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
        """Redistribute over one linear layer and record it; return its input's relevance."""
        messages = weight * x[:, None, :] * share(relevance, x @ weight.T)[:, :, None]
        self.weights[name] = messages.sum(0)
        self.inputs[name], self.outputs[name] = x, relevance
        return messages.sum(1)


def explain(model: Any, row: Any, rules: str = "attnlrp") -> Explanation:
    """Explain the sum of the row's answer-token logits, each at the position that predicts it."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    ids = torch.tensor(row.input_ids)
    states = [weights["model.embed_tokens.weight"][ids]]
    layers = []
    for index in range(model.config.num_hidden_layers):
        layers.append(_Layer(model.config, weights, f"model.layers.{index}.", states[-1]))
        states.append(layers[-1].out)
    normed = _norm(states[-1], weights["model.norm.weight"], model.config.rms_norm_eps)
    logits = normed @ weights["lm_head.weight"].T

    explanation = Explanation()
    relevance = torch.zeros_like(logits)
    for place in range(row.prompt_tokens, len(ids)):
        relevance[place - 1, ids[place]] = logits[place - 1, ids[place]]
    explanation.target = float(relevance.sum())
    # The norms' identity rule: output relevance equals input relevance.
    relevance = explanation.linear("lm_head.weight", weights["lm_head.weight"], normed, relevance)
    for layer in reversed(layers):
        relevance = layer.redistribute(relevance, explanation, rules)
    explanation.tokens = relevance.sum(1)
    return explanation


def share(relevance: Tensor, total: Tensor) -> Tensor:
    """relevance / total, or 0 where there is no relevance."""
    return torch.where(relevance == 0, 0.0, relevance / total)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


def _rotations(tokens: int, size: int, base: float) -> Tensor:
    """(tokens, size, size): the matrices by which rotary position embedding multiplies a head."""
    frequencies = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float) / size))
    angles = torch.arange(tokens).float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    half = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size // 2):
        half[i, i + size // 2], half[i + size // 2, i] = -1.0, 1.0
    return torch.stack([torch.diag(a.cos().double()) + a.sin().double() * half for a in angles])


class _Layer:
    """One decoder layer: the activations of its forward pass, and relevance redistribution."""

    def __init__(
        self, config: Any, weights: dict[str, Tensor], prefix: str, states: Tensor
    ) -> None:
        self.prefix, self.weights, self.states = prefix, weights, states
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        self.rotation = _rotations(len(states), self.size, config.rope_parameters["rope_theta"])
        epsilon = config.rms_norm_eps

        self.norm1 = _norm(states, self.w("input_layernorm"), epsilon)
        self.query = self._split("self_attn.q_proj", self.heads)
        self.key = self._split("self_attn.k_proj", self.groups)
        self.value = self._split("self_attn.v_proj", self.groups)
        self.mixed = torch.zeros(len(states), self.heads, self.size, dtype=torch.float64)
        for head in range(self.heads):
            _, _, _, attended = self._attend(head)
            self.mixed[:, head] = attended
        self.attention = self.mixed.flatten(1) @ self.w("self_attn.o_proj").T
        self.middle = states + self.attention

        self.norm2 = _norm(self.middle, self.w("post_attention_layernorm"), epsilon)
        gate = self.norm2 @ self.w("mlp.gate_proj").T
        self.product = gate / (1 + (-gate).exp()) * (self.norm2 @ self.w("mlp.up_proj").T)
        self.mlp = self.product @ self.w("mlp.down_proj").T
        self.out = self.middle + self.mlp

    def w(self, name: str) -> Tensor:
        return self.weights[f"{self.prefix}{name}.weight"]

    def _split(self, name: str, heads: int) -> Tensor:
        return (self.norm1 @ self.w(name).T).unflatten(1, (heads, self.size))

    def _attend(self, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rotated query and key, weights and output of one head; causal."""
        group = head * self.groups // self.heads
        query = torch.einsum("tji,ti->tj", self.rotation, self.query[:, head])
        key = torch.einsum("tji,ti->tj", self.rotation, self.key[:, group])
        future = torch.ones(len(query), len(query)).triu(1).bool()
        scores = (query @ key.T / self.size**0.5).masked_fill(future, -torch.inf)
        weights = scores.softmax(-1)
        return query, key, weights, weights @ self.value[:, group]

    def redistribute(self, relevance: Tensor, notes: Explanation, rules: str) -> Tensor:
        """Redistribute from the layer's output to its input."""
        to_mlp = share(relevance, self.out) * self.mlp
        to_middle = share(relevance, self.out) * self.middle
        to_product = self._linear(notes, "mlp.down_proj", self.product, to_mlp)
        # Each branch of a product gets half; under cp the gate is constant.
        up, gate = (1.0, 0.0) if rules == "cp" else (0.5, 0.5)
        to_middle = to_middle + self._linear(notes, "mlp.up_proj", self.norm2, up * to_product)
        to_middle += self._linear(notes, "mlp.gate_proj", self.norm2, gate * to_product)

        to_attention = share(to_middle, self.middle) * self.attention
        to_states = share(to_middle, self.middle) * self.states
        to_mixed = self._linear(notes, "self_attn.o_proj", self.mixed.flatten(1), to_attention)
        parts = self._redistribute_heads(to_mixed.view_as(self.mixed), rules)
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            name = f"self_attn.{name}"
            to_states = to_states + self._linear(notes, name, self.norm1, part.flatten(1))
        return to_states

    def _linear(self, notes: Explanation, name: str, x: Tensor, relevance: Tensor) -> Tensor:
        return notes.linear(f"{self.prefix}{name}.weight", self.w(name), x, relevance)

    def _redistribute_heads(self, relevance: Tensor, rules: str) -> tuple[Tensor, Tensor, Tensor]:
        to_query, to_key, to_value = (
            torch.zeros_like(t) for t in (self.query, self.key, self.value)
        )
        for head in range(self.heads):
            group = head * self.groups // self.heads
            query, key, weights, mixed = self._attend(head)
            value = self.value[:, group]
            # mixed[t, d] = sum over s of weights[t, s] value[s, d]
            messages = (
                weights[:, :, None] * value * share(relevance[:, head], mixed)[:, None, :]
            )  # (t, s, d)
            if rules == "cp":
                to_value[:, group] += messages.sum(0)
                continue
            to_value[:, group] += 0.5 * messages.sum(0)
            to_weights = 0.5 * messages.sum(2)
            # Softmax: R_s = score_s (R_s - weight_s sum of R), AttnLRP eq. 12.
            products = query[:, None, :] * key / self.size**0.5  # (t, s, d)
            scores = products.sum(2)
            to_scores = scores * (to_weights - weights * to_weights.sum(1, keepdim=True))
            messages = 0.5 * products * share(to_scores, scores)[:, :, None]
            to_query[:, head] += self._unrotate(self.query[:, head], query, messages.sum(1))
            to_key[:, group] += self._unrotate(self.key[:, group], key, messages.sum(0))
        return to_query, to_key, to_value

    def _unrotate(self, before: Tensor, after: Tensor, relevance: Tensor) -> Tensor:
        """Redistribute through the rotation, a linear map per token."""
        return (self.rotation * before[:, None, :] * share(relevance, after)[:, :, None]).sum(1)
