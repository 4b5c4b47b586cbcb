"""What a planner must know of a model: its parameters, where they are read, and its attention layers."""

import math
from dataclasses import dataclass

from pagedkv.errors import ConfigError
from pagedkv.kv_spec import KVCacheSpec, LayerGroup, kv_element_pair_bytes
from pagedkv.weight_format import WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    The parameters fall into five parts: input tables (`embedding_params`), output head, routed experts, small wide ones
    (`wide_params`), and the other linear layers (`linear_params`), which are the rest.
    """

    name: str
    """Its name in the catalogue, or the path of its config.json: what `--model` takes."""
    title: str
    """Its name for a reader."""
    hf_id: str
    """The Hugging Face repository whose config.json describes it; empty if unknown."""
    source: str
    """Where the numbers come from."""
    aliases: tuple[str, ...] = ()
    """Other Hugging Face repositories of the same shape."""

    hidden_size: int
    """Elements of a hidden state."""
    num_layers: int
    """Decoder layers, or blocks where each has one mixer or one feed-forward part."""
    num_attention_heads: int
    """Query heads per layer."""
    vocab_size: int
    """Rows of the embedding and of the output head."""
    max_context: int
    """The longest sequence the model was made for, in tokens."""
    layer_groups: tuple[LayerGroup, ...]
    """All layers by what they cache."""

    params_total: int
    """All parameters of the language model; a tied head counts once, layers for drafting (MTP) and vision towers not."""
    params_active: int
    """Parameters that one token passes through, the input tables included."""
    embedding_params: int
    """Input tables (tokens, learned positions): resident, but a step reads only a few rows."""
    head_params: int
    """Output head, read by every step that samples. When tied, the same tensor as the token embedding."""
    tied_embeddings: bool
    """Whether the head is the token embedding."""
    wide_params: int
    """Norms, biases, routers and the like, which every format keeps wide."""
    num_experts: int = 0
    """Routed experts per layer; 0 for a dense model."""
    experts_per_token: int = 0
    """Routed experts that one token uses in a layer."""
    expert_params: int = 0
    """Parameters of the routed experts of all layers."""
    num_parts: int = 0
    """Mixers and feed-forward parts of all layers; 0: each layer has one of both."""
    draft_layers: int = 0
    """Layers for drafting (MTP) that the weights bring, which are not counted in `num_layers`."""
    native_format: WeightFormat
    """How the published weights are stored."""

    def __post_init__(self) -> None:
        if self.linear_params < 0:
            raise ConfigError(f"params_total {self.params_total:,} of {self.name} is less than the sum of its parts")
        if any(group.num_layers + group.num_sharing_layers > self.num_layers for group in self.layer_groups):
            raise ConfigError(f"layer_groups of {self.name} have more than its {self.num_layers} layers")
        if not 0 <= self.experts_per_token <= self.num_experts or bool(self.num_experts) != bool(self.expert_params):
            raise ConfigError(f"num_experts, experts_per_token and expert_params of {self.name} contradict each other")

    @property
    def whole_layers(self) -> float:
        """Layers of a mixer and a feed-forward part each, as of which kernels are launched: half of Nemotron-H's blocks."""
        return self.num_parts / 2 if self.num_parts else float(self.num_layers)

    @property
    def linear_params(self) -> int:
        """Parameters of the linear layers that are neither routed experts nor the head."""
        head = 0 if self.tied_embeddings else self.head_params
        return self.params_total - self.embedding_params - head - self.expert_params - self.wide_params

    @property
    def flops_per_token(self) -> float:
        """Multiplications and additions in the linear layers and the head, for one token.

        An engine applies the head to sampled tokens only: a prompt takes `2 * head_params` less for the others.
        """
        tied_head = self.head_params if self.tied_embeddings else 0
        return 2.0 * (self.params_active - self.embedding_params + tied_head)

    @property
    def expert_flops_per_token(self) -> float:
        """What of `flops_per_token` routed experts are."""
        return 2.0 * self.expert_params * self.experts_per_token / self.num_experts if self.num_experts else 0.0

    @property
    def attention_flops_per_pair(self) -> float:
        """Multiplications and additions of QK^T and PV for one query-key pair in every layer."""
        return sum(self.group_attention_flops_per_pair)

    @property
    def group_attention_flops_per_pair(self) -> tuple[float, ...]:
        """The same for each of `layer_groups`, whose windows differ."""
        return tuple(
            2.0 * (g.num_layers + g.num_sharing_layers) * self.num_attention_heads * g.query_dim / g.compression
            for g in self.layer_groups
        )

    def weight_bytes(self, fmt: WeightFormat) -> int:
        """Return the bytes of all weights in memory."""
        return math.ceil(self.embedding_bytes(fmt) + self.dense_streamed_bytes(fmt) + self.expert_bytes(fmt))

    def embedding_bytes(self, fmt: WeightFormat) -> float:
        """Return the bytes that are in memory but not read by a step: input tables that are not the head too."""
        tied_head = self.head_params if self.tied_embeddings else 0
        return (self.embedding_params - tied_head) * _bits(fmt.embedding_bits, fmt.wide_bits) / 8

    def dense_streamed_bytes(self, fmt: WeightFormat) -> float:
        """Return the bytes of weights that every step reads: all but the input tables and the routed experts."""
        linear_bits = _bits(fmt.dense_bits if self.num_experts else None, fmt.bits_per_weight)
        head_bits = _bits(fmt.head_bits, fmt.wide_bits)
        return (self.linear_params * linear_bits + self.head_params * head_bits + self.wide_params * fmt.wide_bits) / 8

    def expert_bytes(self, fmt: WeightFormat) -> float:
        """Return the bytes of all routed experts."""
        return self.expert_params * fmt.bits_per_weight / 8

    def expert_share(self, num_tokens: float) -> float:
        """Return the share of the experts that a step over `num_tokens` tokens touches, if routing were uniform."""
        if self.num_experts == 0:
            return 0.0
        missed_by_one_token = 1.0 - self.experts_per_token / self.num_experts
        return 1.0 - math.pow(missed_by_one_token, num_tokens)

    def streamed_weight_bytes(self, fmt: WeightFormat, num_tokens: float) -> float:
        """Return the bytes of weights that one step over `num_tokens` tokens reads."""
        return self.dense_streamed_bytes(fmt) + self.expert_bytes(fmt) * self.expert_share(num_tokens)

    def kv_spec(self, kv_cache_dtype: str) -> KVCacheSpec:
        """Return the KV cache in `kv_cache_dtype`, a name or two of `KV_CACHE_DTYPES`.

        Raises:
            ConfigError: If there is no such element type.
        """
        kv_element_pair_bytes(kv_cache_dtype)
        return KVCacheSpec(groups=self.layer_groups, dtype_name=kv_cache_dtype)


def _bits(special: float | None, usual: float) -> float:
    return usual if special is None else special
