"""The encoder of umT5 (arXiv 2304.09151; T5 v1.1 with a table of relative positions in every layer).

Parameter names are those of transformers' `UMT5EncoderModel`, to which tests hold it. It stands here because importing
that class takes two seconds, most of what a short video takes from its prompt to its first frame.

    b  batch    l  tokens    d  width    n  heads
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """Shape of an encoder; names and defaults are those of `text_encoder/config.json`."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self):
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(f"feed_forward_proj={self.feed_forward_proj!r} is not supported; use 'gated-gelu'")

    @classmethod
    def from_dict(cls, config: dict) -> "UMT5Config":
        """What a `config.json` says of the encoder; it holds much else.

        Raises ValueError for another model, and for a value that is not supported.
        """
        if config.get("model_type") != "umt5":
            raise ValueError(f"model_type={config.get('model_type')!r} must be 'umt5'")
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    def to_dict(self) -> dict:
        """A `config.json` that transformers reads, too."""
        return {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "dropout_rate": 0.0, **asdict(self)}


class RMSNorm(nn.Module):
    """RMS norm that computes in float32 and gives its weight's dtype where that is a half."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        x = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x if self.weight.dtype == torch.float32 else x.to(self.weight.dtype))


def embedding(rows: int, dim: int) -> nn.Embedding:
    """A table of numbers yet to come: to draw them on "meta" loads a compiler, a second's work."""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


class SelfAttention(nn.Module):
    """Attention without a scale, to whose scores a learnt number for each head and distance is added."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads, self.max_distance = config.num_heads, config.relative_attention_max_distance
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d); `hidden` (b, 1, 1, l) is True where a token is not to be seen."""
        table = self.relative_attention_bias
        places = torch.arange(x.shape[1], device=x.device)
        buckets = bucket(places - places[:, None], table.num_embeddings, self.max_distance)
        bias = table(buckets).permute(2, 0, 1)[None].masked_fill(hidden, torch.finfo(table.weight.dtype).min)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))


def bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Which row of the table is for a distance (key less query): half of them for those after, half for the others.

    Of each half the first half is for one distance each, the rest for ranges that grow as powers, up to the last, which
    is for all from `max_distance` on (T5, arXiv 1910.10683, section 2.1).
    """
    half = num_buckets // 2
    exact, size = half // 2, distance.abs()
    powers = torch.log(size.float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + powers.clamp_min(0).long()).clamp_max(half - 1)
    return half * (distance > 0) + torch.where(size < exact, size, far)


class GatedGELU(nn.Module):
    """Feed-forward of two matrices in, one through GELU (tanh), and one out, which may stay in float32."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        y = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        return self.wo(y if torch.is_autocast_enabled(y.device.type) else y.to(self.wo.weight.dtype))


class Sublayer(nn.Module):
    """A norm and what follows it, under the name that released weights have."""

    def __init__(self, config: UMT5Config, name: str, module: nn.Module):
        super().__init__()
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.add_module(name, module)


class Block(nn.Module):
    """Self-attention, then feed-forward, each added to its input."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        attention = Sublayer(config, "SelfAttention", SelfAttention(config))
        self.layer = nn.ModuleList([attention, Sublayer(config, "DenseReluDense", GatedGELU(config))])

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d)."""
        attention, dense = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), hidden)
        return x + dense.DenseReluDense(dense.layer_norm(x))


class Stack(nn.Module):
    """Embedding, blocks and last norm."""

    def __init__(self, config: UMT5Config, embedding: nn.Embedding):
        super().__init__()
        self.embed_tokens = embedding
        self.block = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class UMT5Encoder(nn.Module):
    """Tokens to states. Its weights are to be read, or drawn by `reset`."""

    def __init__(self, config: UMT5Config):
        super().__init__()
        self.config = config
        self.shared = embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, self.shared)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """States (b, l, d) of tokens (b, l); those past a prompt's end, where the mask is 0, are not seen."""
        x, hidden = self.shared(tokens), mask[:, None, None] == 0
        for block in self.encoder.block:
            x = block(x, hidden)
        return self.encoder.final_layer_norm(x)

    @torch.no_grad()
    def reset(self) -> "UMT5Encoder":
        """Weights to train from: normal, of the deviations that T5 begins with (transformers' for this model)."""
        config, inner = self.config, self.config.num_heads * self.config.d_kv
        deviation = {"shared": 1.0, "q": (config.d_model * config.d_kv) ** -0.5, "o": inner**-0.5,
                     "wo": config.d_ff**-0.5}  # fmt: skip
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0, deviation.get(name.rpartition(".")[2], config.d_model**-0.5))
        return self
