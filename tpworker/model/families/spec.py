"""What the decoder must know of a model, and how a family of models says it. Imports no torch.

The runtime process reads this before any rank is started, so that a model that cannot be served is
refused in an instant.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from tpworker.errors import ModelError
from tpworker.model.families.config import Config
from tpworker.model.families.quantization import Quantization

# What a dimension may be: far above any published model's, and so little that no product overflows, and that
# what is done once for each layer, head or expert takes no time to speak of.
MAX_VOCAB_SIZE = 1 << 24  # the ranks exchange token ids as float32, which is exact below
MAX_LENGTH = 2**31 - 1
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_EXPERTS = 4096  # of a layer
MAX_ALL_EXPERTS = 1 << 16  # of all layers
MAX_EOS_IDS = 16  # a row of the device's table of stop tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every wavelength is stretched: position interpolation (arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Frequency scaling of Llama 3.1 and later: long wavelengths are stretched, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): as Llama 3's, but its ramp is one over the pairs; attention is sharper."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    """Of cosine and sine alike."""
    beta_fast: float = 32.0
    """Pairs that turn at least so often within the original context are kept."""
    beta_slow: float = 1.0
    """Pairs that turn at most so often are stretched by the factor."""
    truncate: bool = True
    """The ramp begins and ends at whole pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753), of sequences within the original context."""

    factors: tuple[float, ...]
    """Of each pair: its wavelength is so many times as long."""
    attention_factor: float
    """Of cosine and sine alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding, halves rotated against each other (GPT-NeoX style)."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None
    rotary_dim: int | None = None
    """The first so many entries of a head are rotated, the others are passed on. None: the whole head."""
    interleaved: bool = False
    """The checkpoint rotates neighbours (2 i, 2 i + 1) against each other. Loading reorders the rows of query
    and key heads so that they become halves: scores do not change when both are permuted alike."""
    max_positions: int | None = None
    """In a sequence of more positions all of them would have other angles; None: they never change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSpec:
    """Sliding windows: in some layers a token does not see every token before it."""

    size: int
    """Tokens that one sees: itself and the size - 1 before it."""
    layers: tuple[int, ...]
    """Numbers of these layers, ascending, one at least; in the others all is seen."""
    rope: RopeSpec | None = None
    """Their rotary positions; None: the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """Mixture of experts: some layers' MLP is k of E small MLPs, chosen token by token, and S shared ones.

    A token's scores are softmax or sigmoid of its router logits (float32). The k experts with the highest
    score + correction bias are chosen, of equal ones the lower id; with groups, only from the `top_groups`
    groups whose two best experts together have most. Their weights are their scores (without the bias),
    divided by their sum, or by `norm_min` if that is more, and multiplied by `scale`. Shared experts have
    weight 1.
    """

    layers: tuple[int, ...]
    """Numbers of the layers that are mixtures, ascending; the others have a dense MLP."""
    num_experts: int
    """E, routed experts."""
    experts_per_token: int
    """k."""
    intermediate_size: int
    """Width of one expert, of a shared one too."""
    num_shared: int = 0
    """S. Published as one MLP of S times the width."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    has_bias: bool = False
    """There is a correction bias, float32 [E]."""
    normalise: bool = True
    norm_min: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    """Groups of E / num_groups consecutive experts, of two experts at least where there are several."""
    top_groups: int = 1
    float32_gate: bool = False
    """The router's weight is held in float32 whatever the model's dtype, as it is published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpSpec:
    """A head for multi-token prediction (MTP): one more layer, which drafts the token behind the next.

    At position i it gets h_i, the model's hidden state there, and the token behind it (DeepSeek-V3, arXiv
    2412.19437, section 2.2):

        x = projection([embedding_norm(embedding(token i + 1)), hidden_norm(h_i)])
        draft of token i + 2 = argmax(output head(norm(layer(x))))

    Embedding and output head are the model's own. A further draft comes of the same head, one position on, of
    its own output in place of h and of its draft. Both times that is the state behind the norm that stands
    before the output head, as it is in SGLang and Megatron-Core; vLLM takes a further step's from before it.
    """

    has_experts: bool = False
    """The layer's MLP is a mixture of experts, as `ModelSpec.moe` says."""
    before_final_norm: bool = False
    """It was trained on states x from before the model's final norm, which is then `norm` as well. Of a
    normed one, y = final * x / rms(x), that is hidden_norm(x) = y * hidden / final (the norms' weights)."""
    has_bias: bool = False
    """Of the projection."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model: dimensions, what its layers have and have not, and its defaults for generation."""

    family: str
    """Key of `FAMILIES`: whose weight names the checkpoint uses."""
    architecture: str
    """As config.json names it, e.g. `LlamaForCausalLM`."""
    model_type: str = ""
    """The same, e.g. `llama`; '': it says none."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the MLP of dense layers."""
    num_layers: int
    num_heads: int
    """Query heads; a multiple of `num_kv_heads`."""
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    """Most positions the model was made for (max_position_embeddings)."""
    rms_norm_eps: float
    rope: RopeSpec
    dtype: str
    """What the checkpoint says: `float32`, `bfloat16` or `float16`."""
    tie_embeddings: bool = False
    """The output projection is the token embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head, before the rotation."""
    window: WindowSpec | None = None
    attention_scale: float | None = None
    """Products of queries and keys are multiplied by it; None: by head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores s become c tanh(s / c), which is never beyond c; None: they stay as they are."""
    logit_softcap: float | None = None
    """The same of the logits."""
    embed_scale: float = 1.0
    """Embeddings of tokens are multiplied by it, rounded to the weights' dtype; the output head is not."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the gate of dense MLPs."""
    norm_offset: float = 0.0
    """Added to the published weights of all norms."""
    post_norms: bool = False
    """What attention and MLP return is normed, too, before it is added to the residual stream."""
    moe: MoeSpec | None = None
    quantization: Quantization | None = None
    """Of weights; None: they are of `dtype`."""
    num_mtp_layers: int = 0
    """Layers for multi-token prediction that config.json names. Of several, the first makes all drafts."""
    mtp: MtpSpec | None = None
    """None: config.json names no head for multi-token prediction, or there are none in this family."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    """What ends an output, each once: see `tpworker.model.families.generation`."""
    eos_is_default: bool = False
    """No file names any: they are transformers' config class's, and count unless the tokenizer has one."""
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    """Those of temperature, top_p, top_k, min_p and repetition_penalty that generation_config.json sets."""
    generation_ignored: Mapping[str, object] = field(default_factory=dict)
    """Defaults of generation_config.json that would change the output and cannot be had: to be warned of."""
    notes: tuple[str, ...] = ()
    """What else is to be warned of, a line each."""

    def ended_by(self, eos_id: int | None) -> ModelSpec:
        """The model with a tokenizer whose EOS this is. Raises ModelError if there is no room for it."""
        if eos_id is None or not 0 <= eos_id < self.vocab_size:
            return self
        eos_ids = tuple(dict.fromkeys((*(() if self.eos_is_default else self.eos_ids), eos_id)))
        if len(eos_ids) > MAX_EOS_IDS:
            raise ModelError(
                f"eos_token_id and the tokenizer's EOS, {eos_id}, are {len(eos_ids)} tokens; at most "
                f"{MAX_EOS_IDS} can end an output: take some out of generation_config.json or config.json"
            )
        return replace(self, eos_ids=eos_ids, eos_is_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeNames:
    """Published names of a mixture's tensors, as in `WeightNames`; `{expert}`: the expert's number."""

    router: str
    gate: str
    up: str
    down: str
    bias: str = ""
    """Of the router's correction bias, in full."""
    bias_is_row: bool = False
    """Its published shape is [1, E], not [E]."""
    shared_gate: str = ""
    shared_up: str = ""
    shared_down: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpNames:
    """Published names of a head's tensors, as in `WeightNames`; `{layer}`: `ModelSpec.num_layers`."""

    layer: str
    """What the names of its layer begin with, in place of `LAYER`."""
    embedding_norm: str
    hidden_norm: str
    projection: str
    norm: str = ""
    """'': the model's final norm."""
    unread: tuple[str, ...] = ()
    """Regular expressions of what is not read with it: copies of the model's own tensors, and further heads;
    `{further}`: their numbers."""


LAYER = "model.layers.{layer}"
"""What the names of a layer's tensors begin with, in every family that has heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """Published names of a family's tensors, without `.weight` and `.bias`; `{layer}`: the layer's number.

    Query, key and value, or gate and up, that share a name are one tensor, one below the other.
    """

    embed: str
    final_norm: str
    lm_head: str
    attention_norm: str
    query: str
    key: str
    value: str
    query_norm: str
    key_norm: str
    output: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    moe: MoeNames | None = None
    attention_post_norm: str = ""
    mlp_post_norm: str = ""
    mtp: MtpNames | None = None

    def of_layer(self, layer: int) -> WeightNames:
        """The names of one layer's tensors; `{expert}` stays."""
        return self._replaced("{layer}", str(layer))

    def of_mtp(self, num_layers: int) -> WeightNames:
        """The names of the layer of a head for multi-token prediction, and in `mtp` of its other tensors."""
        assert self.mtp is not None
        return self._replaced(LAYER, self.mtp.layer)._replaced("{layer}", str(num_layers))

    def _replaced(self, old: str, new: str) -> WeightNames:
        def changes(names: Any) -> dict[str, Any]:
            values = {field.name: getattr(names, field.name) for field in fields(names)}
            return {key: v.replace(old, new) for key, v in values.items() if isinstance(v, str)}

        moe = self.moe and replace(self.moe, **changes(self.moe))
        mtp = self.mtp and replace(self.mtp, **changes(self.mtp))
        return replace(self, **changes(self), moe=moe, mtp=mtp)


@dataclass(frozen=True, slots=True)
class Family:
    """Models that share weight names and a way to read their config."""

    name: str
    architectures: tuple[str, ...]
    read: Callable[[Config], dict[str, Any]]
    """From config.json to the fields of `ModelSpec` that are the family's business. Raises ModelError."""
    names: WeightNames
    unwrap: Callable[[Config], Config] = lambda config: config
    """From config.json to what it says of the text model."""
    # Old exports carry buffers of the rotary positions, which are computed here.
    ignored_tensors: tuple[str, ...] = (r"(?:.+\.)?rotary_emb\.(?:inv_freq|cos_cached|sin_cached)",)
    """Regular expressions of published tensors that no computation needs."""
    mtp_tensors: tuple[str, ...] = ()
    """Regular expressions of the tensors for multi-token prediction; `{layer}`: number of such a layer."""
    mtp_marks: tuple[str, ...] = ()
    """Names of tensors that each such layer has and no other: one without them is a layer of the model."""

    def mtp_patterns(self, spec: ModelSpec, names: Collection[str], with_mtp: bool) -> tuple[str, ...]:
        """Regular expressions of the tensors for multi-token prediction that are not read.

        Args:
            names: of all tensors of the checkpoint.
            with_mtp: the head is; unread are copies of the model's own tensors and further heads.
        """
        layers = [
            number
            for number in range(spec.num_layers, spec.num_layers + spec.num_mtp_layers)
            if all(mark.replace("{layer}", str(number)) in names for mark in self.mtp_marks)
        ]
        if with_mtp:
            assert self.names.mtp is not None
            further = _any_of(number for number in layers if number > spec.num_layers)
            own = str(spec.num_layers)
            return tuple(
                pattern.replace("{layer}", own).replace("{further}", further)
                for pattern in self.names.mtp.unread
            )
        return tuple(pattern.replace("{layer}", _any_of(layers)) for pattern in self.mtp_tensors)


def _any_of(numbers: Iterable[int]) -> str:
    """A regular expression of these numbers."""
    return f"(?:{'|'.join(map(str, numbers)) or 'none'})"


def with_article(architecture: str) -> str:
    """E.g. 'a LlamaForCausalLM', 'an Ernie4_5ForCausalLM'."""
    return f"{'an' if architecture[0] in 'AEIOU' else 'a'} {architecture}"
