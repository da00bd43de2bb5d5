"""What a model is made of, as far as memory and speed go: its tensors' sizes, and how much of them a token touches.

Decides bytes and operations from the shape of a decoder-only transformer. It must not know cards, engines or where the numbers came from;
`config_json` and `gguf_metadata` read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

GIB: Final = 1024**3
LAYERS_MAX: Final = 1024
SIZE_MAX: Final = 2**24
"""Of every other number of a model: widths, heads, experts, its vocabulary and its context."""
WEIGHT_BYTES_MAX: Final = 2**50
KV_DTYPE_BYTES_MAX: Final = 8.0


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the weights are stored.

    `bits_per_weight` is of the quantised tensors, with their scales and zero points: 4 bits in groups of 128 with a half-precision scale
    and a 4-bit zero point each are 4 + 16/128 + 4/128 = 4.156 (the layout of AWQ and GPTQ checkpoints).
    """

    name: str
    """"none", "awq", "gptq", "fp8", "int8", "mxfp4", "bitsandbytes", or "gguf:Q4_K_M" and the like."""
    bits_per_weight: float
    covers_embeddings: bool = False
    """GGUF files quantise the vocabulary's tables too; the others leave them in half precision."""
    covers_experts_only: bool = False
    """MXFP4 checkpoints quantise the experts alone."""
    other_bits_per_weight: float | None = None
    """Of the tensors that it does not cover; None: the model's own precision."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits_per_weight <= 32 or not 1 <= (self.other_bits_per_weight or 16) <= 32:
            raise ValueError(f"{self.bits_per_weight} bits a weight is not a quantisation")

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file stores them."""
        return self.name.startswith("gguf:")


UNQUANTIZED: Final = Quantization("none", 16)


@dataclass(frozen=True)
class ModelArchitecture:
    """A decoder-only transformer with gated feed-forward layers and grouped-query attention, dense or with experts.

    Without slots, so that sizes are worked out once: a box of many cards asks for them thousands of times.
    """

    model_id: str
    layer_count: int
    hidden_size: int
    attention_head_count: int
    kv_head_count: int
    head_dim: int
    intermediate_size: int
    """Width of the feed-forward layer, or of one expert."""
    vocabulary_size: int
    context_length_max_tokens: int
    expert_count: int = 0
    experts_per_token: int = 0
    shared_expert_intermediate_size: int = 0
    tie_word_embeddings: bool = False
    sliding_window_tokens: int = 0
    sliding_layer_count: int = 0
    """Layers that keep only the last `sliding_window_tokens` of a sequence."""
    linear_attention_layer_count: int = 0
    """Layers that keep a state of fixed size, of a few MB a sequence, instead of keys and values."""
    key_equals_value: bool = False
    dtype_bytes: int = 2
    kv_dtype_bytes: float = 2.0
    quantization: Quantization = UNQUANTIZED
    weight_bytes_of_files: int | None = None
    """The exact size of the weight files, where it is known; the derived one leaves out norms and biases."""

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.attention_head_count % self.kv_head_count:
            raise ValueError(f"{self.attention_head_count} attention heads cannot share {self.kv_head_count} KV heads evenly")
        if self.sliding_layer_count + self.linear_attention_layer_count > self.layer_count:
            raise ValueError("more sliding and linear attention layers than layers")
        if not 0 <= self.experts_per_token <= self.expert_count or (self.expert_count and not self.experts_per_token):
            raise ValueError(f"{self.experts_per_token} of {self.expert_count} experts a token")

    def _check_sizes(self) -> None:
        """All within bounds: what is computed from them is finite and above zero."""
        name = self.model_id or "the model"
        widths = (self.hidden_size, self.attention_head_count, self.kv_head_count, self.head_dim)
        positive = (*widths, self.intermediate_size, self.vocabulary_size, self.context_length_max_tokens)
        if min(self.layer_count, *positive) < 1:
            raise ValueError(f"{name}: every size must be at least 1")
        counts = (self.expert_count, self.experts_per_token, self.shared_expert_intermediate_size, self.sliding_window_tokens)
        if min(*counts, self.sliding_layer_count, self.linear_attention_layer_count) < 0:
            raise ValueError(f"{name}: no count is below 0")
        if self.layer_count > LAYERS_MAX or max(*positive, *counts) > SIZE_MAX:
            raise ValueError(f"{name}: {LAYERS_MAX} layers are the most, and {SIZE_MAX} of everything else")
        if not 1 <= self.dtype_bytes <= KV_DTYPE_BYTES_MAX or not 0 < self.kv_dtype_bytes <= KV_DTYPE_BYTES_MAX:
            raise ValueError(f"{name}: a weight has {self.dtype_bytes} bytes, and a key or value {self.kv_dtype_bytes}")
        if self.weight_bytes_of_files is not None and not 0 < self.weight_bytes_of_files <= WEIGHT_BYTES_MAX:
            raise ValueError(f"{name}: its files hold {self.weight_bytes_of_files} bytes of weights")

    @property
    def growing_layer_count(self) -> int:
        """Layers whose keys and values grow with every token of a sequence."""
        return self.layer_count - self.sliding_layer_count - self.linear_attention_layer_count

    @property
    def kv_bytes_per_layer_token(self) -> float:
        """KV heads x head dim x (2, or 1 if K = V) x bytes an element: club-3090's docs/KV_MATH.md, and every engine."""
        return self.kv_head_count * self.head_dim * (1 if self.key_equals_value else 2) * self.kv_dtype_bytes

    @property
    def attention_parameters(self) -> int:
        """Of one layer: queries and output are as wide as the heads, keys and values as the KV heads."""
        return 2 * self.hidden_size * self.head_dim * (self.attention_head_count + self.kv_head_count)

    @property
    def expert_parameters(self) -> int:
        """Of one expert of one layer, or of the dense feed-forward layer: gate, up and down."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def embedding_parameters(self) -> int:
        """Of the table from tokens to vectors. The way back is a second table of that size, or the same one where they are tied."""
        return self.vocabulary_size * self.hidden_size

    @property
    def parameter_count(self) -> int:
        """Norms and biases, which are a few thousandths, left out."""
        tables = self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
        return tables + self.layer_count * (self._always_read_parameters + max(1, self.expert_count) * self.expert_parameters)

    @cached_property
    def _always_read_parameters(self) -> int:
        """Of one layer, what every token touches, the dense feed-forward layer left out."""
        router = self.hidden_size * self.expert_count
        return self.attention_parameters + router + 3 * self.hidden_size * self.shared_expert_intermediate_size

    @cached_property
    def derived_weight_bytes(self) -> float:
        """Of all weights, from the shape and the quantisation alone."""
        experts = max(1, self.expert_count) * self.expert_parameters * self.quantization.bits_per_weight
        tables = self.embedding_parameters * (1 if self.tie_word_embeddings else 2) * self._table_bits
        return (self.layer_count * (self._always_read_parameters * self._dense_bits + experts) + tables) / 8

    @property
    def weight_bytes(self) -> float:
        """Of all weights: what the files hold, and what lies in memory."""
        return self.derived_weight_bytes if self.weight_bytes_of_files is None else float(self.weight_bytes_of_files)

    @cached_property
    def layer_bytes(self) -> float:
        """Weights of one layer."""
        return self._always_read_bytes + max(1, self.expert_count) * self._expert_bytes

    @cached_property
    def embedding_bytes(self) -> float:
        """Of one of the vocabulary's tables."""
        return self._files_per_derived * self.embedding_parameters * self._table_bits / 8

    @property
    def _dense_bits(self) -> float:
        return self._other_bits if self.quantization.covers_experts_only else self.quantization.bits_per_weight

    @property
    def _table_bits(self) -> float:
        return self.quantization.bits_per_weight if self.quantization.covers_embeddings else self._other_bits

    @property
    def _other_bits(self) -> float:
        return self.quantization.other_bits_per_weight or 8 * self.dtype_bytes

    @property
    def _files_per_derived(self) -> float:
        return self.weight_bytes / self.derived_weight_bytes

    @cached_property
    def _expert_bytes(self) -> float:
        """Of one expert of one layer, or of the dense feed-forward layer."""
        return self._files_per_derived * self.expert_parameters * self.quantization.bits_per_weight / 8

    @cached_property
    def _always_read_bytes(self) -> float:
        return self._files_per_derived * self._always_read_parameters * self._dense_bits / 8

    def layer_read_bytes(self, token_count: int) -> float:
        """Weights of one layer that a step over `token_count` tokens reads.

        With experts: `token_count` tokens that choose k of E at random touch E x (1 - (1 - k/E)^token_count) of them.
        """
        if not self.expert_count:
            return self.layer_bytes
        missed = (1 - self.experts_per_token / self.expert_count) ** token_count
        return self._always_read_bytes + self.expert_count * (1 - missed) * self._expert_bytes

    @property
    def layer_flops_per_token(self) -> float:
        """Two operations for every weight that a token meets in one layer; attention over the past comes on top."""
        return 2.0 * (self._always_read_parameters + max(1, self.experts_per_token) * self.expert_parameters)

    @property
    def wide_values_per_token(self) -> int:
        """Of the feed-forward layer, over all experts that a token meets."""
        return self.intermediate_size * max(1, self.experts_per_token) + self.shared_expert_intermediate_size

    @property
    def layer_expert_flops_per_token(self) -> float:
        """Of those, the ones that experts take; 0 for a dense model."""
        return 2.0 * self.experts_per_token * self.expert_parameters

    def attention_flops(self, past_tokens: float) -> float:
        """Of one token in one layer with attention over `past_tokens`: scores and weighted sum, two operations each for every head."""
        return 4.0 * self.attention_head_count * self.head_dim * past_tokens

    def sequence_kv_bytes(self, token_count: float) -> float:
        """Keys and values of one sequence of `token_count` tokens, over all layers.

        Layers with a window stop growing at it; layers with linear attention are counted as nothing.
        """
        windowed = self.sliding_layer_count * min(token_count, self.sliding_window_tokens)
        return self.kv_bytes_per_layer_token * (self.growing_layer_count * token_count + windowed)
