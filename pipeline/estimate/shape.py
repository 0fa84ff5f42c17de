"""The part of a model's shape that determines memory, and the tensors that a pass keeps.

Counted from what torch saves for the backward pass; the test counts them again for every family.
"""

from dataclasses import dataclass
from functools import cached_property

from agcl.lrp import attributed_linears, weight_of
from agcl.lrp.families import architecture_of, family_named, gemma_norm, layer_norm
from transformers import PreTrainedModel

_HEAD_NORMS = ("q_norm", "k_norm")
_WRITTEN_OUT = ("gelu_new", "gelu_fast", "gelu_python")
"""Activations that transformers computes in several steps, each of which keeps a tensor."""


@dataclass(frozen=True)
class Shape:
    """Numbers of weights, and the widths of a layer's tensors."""

    weights: int
    """Weights of the whole model, tied ones once."""
    embeddings: int
    """Weights of embeddings and head, tied ones once."""
    vocabulary: int
    width: int
    """Width of the residual stream."""
    layers: int
    linears: tuple[tuple[int, int], ...]
    """(out, in) of every attributed linear layer of the model, in its order."""
    query: int
    """Width of all heads' queries together."""
    key: int
    """Width of all heads' keys together; values are as wide."""
    inner: int
    """Width of the MLP."""
    norms: int
    """Per layer, those of single heads excluded."""
    has_head_norms: bool
    is_rms: bool
    """Whether norms are RMS norms, which keep what they scale as well as their input."""
    is_gemma: bool
    is_fused: bool
    """Whether one linear layer computes query, key and value, which stay in memory together."""
    is_rotary: bool
    is_gated: bool
    """Whether the MLP multiplies two branches."""
    of_activation: int
    """Tensors as wide as the MLP that its activation keeps."""
    eager_heads: int
    """Heads whose attention weights are kept, as eager attention does; 0 with another one."""
    capped_logits: int
    """Copies of the logits that a cap on them keeps."""

    @cached_property
    def linear_weights(self) -> int:
        """Weights of all attributed linear layers."""
        return sum(out * width for out, width in self.linears)

    @property
    def layer_weights(self) -> int:
        """Weights of one layer."""
        return (self.weights - self.embeddings) // self.layers

    @property
    def of_layer(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of one layer's linear layers."""
        return self.linears[: len(self.linears) // self.layers]

    def kept_by_training(self, tokens: int, length: int, *, half: bool, frozen: bool) -> int:
        """Bytes that one layer's forward pass keeps of `tokens`, in rows of a `length`.

        `half` is bfloat16 autocast: it leaves the residual stream in float32, and gives every
        linear layer its own copy of its input. `frozen` norms keep less.
        """
        of_norm = 1 + (self.is_rms and not frozen)
        wide = self.norms * of_norm * self.width
        wide += self.has_head_norms * of_norm * (self.query + self.key)
        wide += 2 * self.eager_heads * length
        readers = len(self.of_layer) - 2 if half else 2
        inputs = readers * self.width + self.query + self.inner
        attended = self.query + 2 * self.key + self._attended(replaced=not self.is_fused)
        mlp = (2 * self.is_gated + self.of_activation) * self.inner
        return tokens * (4 * wide + (2 if half else 4) * (inputs + attended + mlp))

    def kept_in_bfloat16(self, tokens: int, length: int, *, frozen: bool) -> int:
        """The same of a model with bfloat16 weights: half as much, but some work in float32.

        RMS norms do, those of Gemma with their weight, and the softmax of eager attention.
        """
        normed = self.norms * self.width + self.has_head_norms * (self.query + self.key)
        extra = normed * self.is_rms * (4 if self.is_gemma and not frozen else 2)
        extra += 4 * self.eager_heads * length
        whole = self.kept_by_training(tokens, length, half=False, frozen=frozen)
        return whole // 2 + tokens * extra

    def kept_for_adapter(self, tokens: int, rank: int, *, autocast: bool, in_half: bool) -> int:
        """What LoRA of float32 factors adds to these: what each A makes, and its input's copy.

        PEFT makes one for every layer where the weights are `in_half`. `autocast` rounds both to
        bfloat16.
        """
        size, copies = 2 if autocast else 4, 0
        if in_half:
            copies = size * sum(width for _, width in self.of_layer) - 2 * sum(self.inputs)
        return tokens * (copies + size * rank * len(self.of_layer))

    def kept_by_attribution(
        self, tokens: int, length: int, *, half: bool = False, autocast: bool = False
    ) -> int:
        """The same for a relevance backward pass, without what its hooks hold.

        No weight is trained, a norm keeps its scale, an activation its factor (`agcl/lrp/rules`).
        `half` is a model with bfloat16 weights: half as much, but for the softmax of eager
        attention. `autocast` leaves the residual stream in float32 too.
        """
        heads, rounded = self.query + self.key, half or autocast
        kept = self.has_head_norms * heads
        kept += self._attended(replaced=False) + 2 * self.eager_heads * length
        kept += (1 + self.is_gated) * self.inner
        kept = (2 if rounded else 4) * kept + rounded * 4 * self.eager_heads * length
        return tokens * (kept + (2 if half else 4) * self.norms * self.width)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Widths of a layer's distinct inputs: of attention, its output, the MLP, its output."""
        return (self.width, self.query, self.width, self.inner)

    def held_by_hooks(
        self, tokens: int, *, entries: bool, half: bool = False, autocast: bool = False
    ) -> int:
        """Bytes of a layer's inputs, and of outputs: for entries all, else those of products."""
        outputs = sum(out for out, _ in self.of_layer)
        if not entries:  # The value, or the whole that it is a part of, and the MLP's branches.
            whole = (1 + self.is_rotary) * self.query + 2 * self.key
            outputs = whole if self.is_fused else self.key
            outputs += self.is_gated * (1 + self.is_fused) * self.inner
        size = 2 if half or autocast else 4
        # Autocast does not round what a norm returns.
        return tokens * (size * (sum(self.inputs) + outputs) + autocast * 2 * 2 * self.width)

    def passing(self, tokens: int, *, half: bool) -> int:
        """Bytes that one layer needs temporarily in a forward pass without a backward pass."""
        mlp = (2 + self.is_gated) * self.inner
        return tokens * (4 * 3 * self.width + (2 if half else 4) * mlp)

    def _attended(self, *, replaced: bool) -> int:
        """Width of what attention makes of query, key and value and keeps, without its weights.

        Whether the rotated query and key replace the ones that they were made from.
        """
        rotated = self.query + self.key if self.is_rotary and not replaced else 0
        repeated = 2 * (self.query - self.key) if self.eager_heads else 0
        return rotated + repeated


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a model of a supported family, such as an empty one on the meta device."""
    config, family = model.config, family_named(architecture_of(model))
    weights = map(weight_of, attributed_linears(model).values())
    linears = [(weight.shape[0], weight.shape[1]) for weight in weights]
    is_fused = not any(name.endswith("k_proj") for name in family.linears)
    heads = int(config.num_attention_heads)
    query = heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    of_layer = [name for name in family.norms if "#" in name]
    activation = str(getattr(config, "activation_function", getattr(config, "hidden_act", "")))
    outside = (model.get_input_embeddings(), model.get_output_embeddings())
    return Shape(
        weights=sum(p.numel() for p in model.parameters()),
        embeddings=sum(p.numel() for p in {p for each in outside for p in each.parameters()}),
        vocabulary=int(config.vocab_size),
        width=int(config.hidden_size),
        layers=int(config.num_hidden_layers),
        linears=tuple(linears),
        query=query,
        key=(max(linears[0][0], linears[1][0]) - query) // 2 if is_fused else linears[1][0],
        inner=linears[-1][1],
        norms=sum(not name.endswith(_HEAD_NORMS) for name in of_layer),
        has_head_norms=any(name.endswith(_HEAD_NORMS) for name in of_layer),
        is_rms=family.norm is not layer_norm,
        is_gemma=family.norm is gemma_norm,
        is_fused=is_fused,
        is_rotary=getattr(config, "rope_parameters", None) is not None,
        is_gated=bool(family.products),
        of_activation=4 if activation in _WRITTEN_OUT else 1,
        eager_heads=heads if config._attn_implementation == "eager" else 0,
        capped_logits=2 * bool(getattr(config, "final_logit_softcapping", None)),
    )
