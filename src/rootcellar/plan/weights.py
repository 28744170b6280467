"""How many bytes a model's weights take, counted from its config.

Matrices only: norms, biases, convolutions and the vision tower of a multimodal model are left out (together about one
percent). Quantised checkpoints are counted at the width of their method. What is known exactly should be given instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from rootcellar.plan.fields import Raw
from rootcellar.plan.layers import Architecture, Group, head_dim, kv_heads_of, latent, need, state_of

# Bytes of a quantised weight: mxfp4 has a scale byte for 32 elements.
_QUANTISED = {"fp8": 1.0, "mxfp4": 0.5 + 1 / 32}


@dataclass(frozen=True, slots=True)
class Matrices:
    """The matrices of a model, over all devices.

    Attributes:
        vocabulary: elements of the embedding, and as many of the head; ``tied``: whether they are one matrix.
        layers: elements of what each token passes: attention, dense feed-forward parts, routers.
        experts: elements of the experts of all layers. Of ``of`` in a layer a token passes ``chosen``.
        wide, narrow, thin: bytes of an element of the vocabulary's, of the layers', of the experts'.
    """

    vocabulary: int
    tied: bool
    layers: int
    experts: int
    of: int
    chosen: int
    wide: float
    narrow: float
    thin: float

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        vocabulary = self.vocabulary * (1 if self.tied else 2) * self.wide
        return round(vocabulary + self.layers * self.narrow + self.experts * self.thin)


def matrices(model: Architecture) -> Matrices:
    """Of a model, as its config says."""
    text = model.text
    wide = float(model.itemsize)
    method = str((text.get("quantization_config") or {}).get("quant_method") or "")
    narrow = _QUANTISED.get(method, wide)
    attention = sum(len(group.kind.layers) * _mixer(group, text) for group in model.groups)
    dense, experts = _mlps(text, model.num_layers)
    of = _experts_of(text)
    return Matrices(
        vocabulary=int(need(text, "vocab_size")) * int(need(text, "hidden_size")),
        tied=bool(text.get("tie_word_embeddings")),
        layers=attention + dense,
        experts=experts,
        of=of,
        chosen=min(of, int(text.get("num_experts_per_tok") or 1)),
        wide=wide,
        # mxfp4 checkpoints keep everything but the experts wide; fp8 ones everything but the embeddings narrow.
        narrow=wide if method == "mxfp4" else narrow,
        thin=narrow,
    )


def weight_bytes(model: Architecture) -> int:
    """Bytes of all weights, over all devices."""
    return matrices(model).nbytes


def _mixer(group: Group, text: Raw) -> int:
    """Elements of the matrices of one layer's attention, or of what stands in its place."""
    hidden = int(need(text, "hidden_size"))
    if group.kind.rule == "recurrent":
        stored = state_of(text)
        _, channels = stored.conv
        if text.get("linear_num_value_heads"):  # in: q, k, v, gate, two numbers for each head; out
            heads, width = int(text["linear_num_value_heads"]), int(need(text, "linear_value_head_dim"))
            return hidden * (channels + 2 * heads * width + 2 * heads)
        inner, _ = stored.state
        return hidden * (channels + 2 * inner + int(text.get("mamba_n_heads") or 0))
    heads = int(need(text, "num_attention_heads"))
    if latent(text):
        rank, rope = int(text["kv_lora_rank"]), int(need(text, "qk_rope_head_dim"))
        nope, value = int(need(text, "qk_nope_head_dim")), int(need(text, "v_head_dim"))
        q_rank = int(text.get("q_lora_rank") or 0)
        queries = heads * (nope + rope)
        q = q_rank * (hidden + queries) if q_rank else hidden * queries
        return q + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    return hidden * head_dim(text) * (2 * heads + 2 * kv_heads_of(text))


def _mlps(text: Raw, layers: int) -> tuple[int, int]:
    """Elements of the dense and of the expert feed-forward matrices of all layers (gated: three matrices each)."""
    hidden, inner = int(need(text, "hidden_size")), int(need(text, "intermediate_size"))
    count = _experts_of(text)
    if not count:
        return layers * 3 * hidden * inner, 0
    if text.get("intermediate_size_mlp"):  # Llama 4: intermediate_size is an expert's
        dense_inner, expert_inner, shared = int(text["intermediate_size_mlp"]), inner, inner
        sparse = layers // int(text.get("interleave_moe_layer_step") or 1)
    else:
        dense_inner, expert_inner = inner, int(text.get("moe_intermediate_size") or inner)
        shared = int(text.get("n_shared_experts") or 0) * expert_inner
        shared += int(text.get("shared_expert_intermediate_size") or text.get("shared_intermediate_size") or 0)
        sparse = layers - int(text.get("first_k_dense_replace") or 0)
        sparse = len(range(0, sparse, int(text.get("expert_layer_period") or 1)))
    dense = (layers - sparse) * 3 * hidden * dense_inner + sparse * (3 * hidden * shared + hidden * count)
    return dense, sparse * count * 3 * hidden * expert_inner


def _experts_of(text: Raw) -> int:
    """Experts of a layer that are chosen among; 0 where there are none."""
    return int(text.get("n_routed_experts") or text.get("num_local_experts") or text.get("num_experts") or 0)
