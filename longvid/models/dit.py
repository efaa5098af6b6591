"""The video DiT of the Wan family: embed, loop over layers, unembed.

It maps (latents, timesteps, text, context) to velocity and new features. It knows no prompt, seed, plan, rank or
mesh. Layers are keyed by their index in the whole model, so a process may hold a part of them, with or without the
ends. Parameter names are those of diffusers' `WanTransformer3DModel` and `SkyReelsV2Transformer3DModel`.

Axes: b batch, f latents, h and w patches, d model width, l text tokens. Hidden states are (b, f, h, w, d) throughout,
so geometry travels with them. Modulation stays per latent, (b, f, 6, d), and is broadcast over its tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from longvid.models.attention import KV, Exchange, Rotate, Rotation, Sight, attend, look, rotate, rotation, visible_in
from longvid.models.cache import Context, Features
from longvid.types import Latents, Text, Timesteps

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TextFeatures = Mapping[int, tuple[Tensor, Tensor]]
"""Cross-attention keys and values of a prompt by layer, each (b, l, n, head dimension): computed once per prompt."""

WAN = "WanTransformer3DModel"
SKYREELS = "SkyReelsV2Transformer3DModel"


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a DiT; names as in the released `transformer/config.json`."""

    class_name: str
    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    inject_sample_info: bool = False
    rope_max_seq_len: int = 1024

    def __post_init__(self):
        if self.class_name not in (WAN, SKYREELS):
            raise ValueError(f"transformer class {self.class_name!r} is not known; use {WAN} or {SKYREELS}")
        if self.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm={self.qk_norm!r} is not supported; use 'rms_norm_across_heads'")
        if self.attention_head_dim % 2 or self.attention_head_dim < 6:
            raise ValueError(f"attention_head_dim={self.attention_head_dim} must be even and at least 6")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size={self.patch_size} must be 1 in time; try (1, 2, 2)")
        if self.inject_sample_info and self.class_name != SKYREELS:
            raise ValueError(f"inject_sample_info belongs to {SKYREELS}, not to {self.class_name}")

    @property
    def dim(self) -> int:
        """Width of the model."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, config: dict) -> "DiTConfig":
        """Read a released `config.json`. Raises ValueError for a key or a value that this model does not honour."""
        config = dict(config)
        values = {"class_name": config.pop("_class_name", None)}
        ignored = {"num_frame_per_block", "pos_embed_seq_len"}
        for key in ("image_dim", "added_kv_proj_dim"):
            if config.pop(key, None) is not None:
                raise ValueError(f"{key} is set: CLIP image conditions are not supported; use a T2V checkpoint")
        known = {f.name for f in fields(cls)}
        for key, value in config.items():
            if key in known:
                values[key] = tuple(value) if key == "patch_size" else value
            elif not key.startswith("_") and key not in ignored:
                raise ValueError(f"the DiT config has the unknown key {key!r}; it may hold {', '.join(sorted(known))}")
        values["out_channels"] = values.get("out_channels") or values["in_channels"]
        return cls(**values)

    def to_dict(self) -> dict:
        """What `transformer/config.json` holds."""
        config = {f.name: getattr(self, f.name) for f in fields(self)}
        config["_class_name"] = config.pop("class_name")
        config["patch_size"] = list(self.patch_size)
        if self.class_name == WAN:
            del config["inject_sample_info"]
        return config


class RMSNorm(nn.RMSNorm):
    """RMS norm whose weight follows its input's dtype, so that autocast finds the fused kernel.

    torch has none for float32 on CPUs: where no gradient is taken, half the work is done here.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled():
            size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return size.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_().mul(x).mul_(self.weight)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Projections and the RMS norm of queries and keys over the full width."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def query(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., n, head dimension)."""
        return self.norm_q(self.to_q(x)).unflatten(-1, (self.num_heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., d) -> twice (..., n, head dimension)."""
        keys = self.norm_k(self.to_k(x)).unflatten(-1, (self.num_heads, -1))
        return keys, self.to_v(x).unflatten(-1, (self.num_heads, -1))

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., d) -> three times (..., n, head dimension)."""
        return self.query(x), *self.key_value(x)

    def output(self, x: Tensor) -> Tensor:
        """(..., n, head dimension) -> (..., d)."""
        return self.to_out[0](x.flatten(-2))


class Projection(nn.Module):
    """A linear layer under the name `proj`, as released checkpoints have it."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)


class TanhGELU(nn.GELU):
    """GELU by its tanh approximation."""

    def __init__(self):
        super().__init__("tanh")

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...). In training as a sigmoid, which it is too, and which compiles to half the time on a CPU."""
        if x.requires_grad:
            return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
        return super().forward(x)


class FeedForward(nn.Module):
    """Two linear layers with an activation between; `net.0.proj` and `net.2` as released."""

    def __init__(self, dim: int, hidden: int, dim_out: int, activation: nn.Module):
        super().__init__()
        self.net = nn.ModuleList([Projection(dim, hidden), activation, nn.Linear(hidden, dim_out)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim_out)."""
        return self.net[2](self.net[1](self.net[0].proj(x)))


class TwoLayer(nn.Module):
    """`linear_1`, activation, `linear_2`: the embedders of time and text."""

    def __init__(self, dim_in: int, dim: int, activation: nn.Module):
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.activation = activation
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim)."""
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """Timesteps to modulation, text states to the model's width."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.time_embedder = TwoLayer(config.freq_dim, config.dim, nn.SiLU())
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLayer(config.text_dim, config.dim, TanhGELU())


def sinusoid(timesteps: Timesteps, dim: int) -> Tensor:
    """Cosines then sines of `t * 10000^(-i / (dim / 2))`, (b, f, dim), through float64."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=timesteps.device) / (dim // 2))
    angles = timesteps.double()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).float()


def modulation_table(rows: int, dim: int) -> Tensor:
    """Random, (1, rows, dim), for training to start from; on "meta" empty, since arithmetic there loads a compiler."""
    if torch.get_default_device().type == "meta":
        return torch.empty(1, rows, dim)
    return torch.randn(1, rows, dim) / dim**0.5


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm, scaled and shifted by (b, f or 1, 1, 1, d), in float32.

    Where there is one scale for all it is the norm's weight: one pass over memory instead of two.
    """
    x, size = x.float(), x.shape[-1:]
    if shift.numel() == size[0]:
        return F.layer_norm(x, size, (1 + scale).flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x, size, eps=eps), 1 + scale)


def gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """x + update * gate, of (b, f or 1, 1, 1, d), in float32; in x's dtype."""
    return torch.addcmul(x.float(), update.float(), gate).type_as(x)


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer norm in the dtype of its weight; in x's dtype."""
    return norm(x.to(norm.weight.dtype)).type_as(x)


class TokenWise(NamedTuple):
    """What a layer does to each token alone, between its products; `longvid/models/compiled.py` has others for it."""

    modulated: Callable[[Tensor, Tensor, Tensor, float], Tensor] = modulated
    gated: Callable[[Tensor, Tensor, Tensor], Tensor] = gated
    normed: Callable[[Tensor, nn.LayerNorm], Tensor] = normed
    rotate: Rotate = rotate


class Layer(nn.Module):
    """Self-attention over block and context, cross-attention to the text, feed-forward."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, self.eps = config.dim, config.eps
        self.attn1 = Attention(dim, config.num_attention_heads, config.eps)
        self.attn2 = Attention(dim, config.num_attention_heads, config.eps)
        self.norm2 = nn.LayerNorm(dim, config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(dim, config.ffn_dim, dim, TanhGELU())
        self.scale_shift_table = nn.Parameter(modulation_table(6, dim))
        self.token_wise = TokenWise()

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        text: tuple[Tensor, Tensor],
        sights: Sequence[Sight],
        turn: Rotation,
        visible: "Tensor | BlockMask | None",
        exchange: Exchange = Exchange(),  # noqa: B008  it has no state
    ) -> tuple[Tensor, KV]:
        """Hidden states (b, f, h, w, d) to hidden states, and this layer's features of them."""
        table = (self.scale_shift_table + modulation.float())[..., None, None, :]  # (b, f or 1, 6, 1, 1, d)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = table.unbind(2)

        do = self.token_wise
        normed = do.modulated(x, shift_attn, scale_attn, self.eps).type_as(x)
        attended, features = self._self_attention(normed, sights, turn, visible, exchange)
        x = do.gated(x, attended, gate_attn)

        normed = x if self.norm2 is None else do.normed(x, self.norm2)
        query = self.attn2.query(normed).flatten(1, 3)
        x = x + self.attn2.output(attend(query, *text)).view_as(x)

        normed = do.modulated(x, shift_ffn, scale_ffn, self.eps).type_as(x)
        return do.gated(x, self.ffn(normed), gate_ffn), features

    def _self_attention(
        self,
        x: Tensor,
        sights: Sequence[Sight],
        turn: Rotation,
        visible: "Tensor | BlockMask | None",
        exchange: Exchange,
    ) -> tuple[Tensor, KV]:
        query, keys, values = exchange.by_heads(*(y.flatten(2, 3) for y in self.attn1.query_key_value(x)))
        own = KV(keys, values)
        outs = [look(query, own, sight, turn, visible, self.token_wise.rotate) for sight in sights]
        out = torch.cat(outs, 1) if len(outs) > 1 else outs[0]
        out = exchange.by_tokens(out.unflatten(1, (x.shape[1], -1)))
        return self.attn1.output(out).view_as(x), own


class DiT(nn.Module):
    """The whole model, or the range `layers` of it; the first layer's owner embeds, the last one's unembeds."""

    def __init__(self, config: DiTConfig, layers: range | None = None):
        super().__init__()
        self.config = config
        self.layers = range(config.num_layers) if layers is None else layers
        if not self.layers or self.layers[0] < 0 or self.layers[-1] >= config.num_layers or self.layers.step != 1:
            raise ValueError(f"layers={self.layers} must be a range within 0 to {config.num_layers}")
        self.is_first = self.layers[0] == 0
        self.is_last = self.layers[-1] == config.num_layers - 1
        dim = config.dim
        if self.is_first:
            self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleDict({str(i): Layer(config) for i in self.layers})
        if config.inject_sample_info:
            self.fps_embedding = nn.Embedding(2, dim)
            self.fps_projection = FeedForward(dim, dim, 6 * dim, nn.SiLU())
        if self.is_last:
            height, width = config.patch_size[1:]
            self.proj_out = nn.Linear(dim, config.out_channels * height * width)
            self.scale_shift_table = nn.Parameter(modulation_table(2, dim))

    def text_features(self, text: Text) -> TextFeatures:
        """Cross-attention keys and values of a prompt for this part's layers; compute once, pass to every forward."""
        states = self.condition_embedder.text_embedder(text.to(self.proj_dtype))
        return {int(i): layer.attn2.key_value(states) for i, layer in self.blocks.items()}

    def forward(
        self,
        x: Latents | Tensor,
        timesteps: Timesteps,
        text: TextFeatures,
        contexts: Sequence[Context] = (Context(),),
        *,
        fps: int = 24,
        keep: bool = True,
        mask: Tensor | None = None,
        exchange: Exchange = Exchange(),  # noqa: B008  it has no state
    ) -> tuple[Latents | Tensor, Features]:
        """Velocity of the latents (b, c, f, h, w) and the features that each layer leaves.

        A part without the first layer takes hidden states (b, f, h, w, d), one without the last gives them.
        `timesteps` are 1000 sigma per latent, (b, f), or (b, 1) where they are all the same. `fps` matters only to
        models with an fps embedding (16, or anything else: SkyReels-V2 DF-1.3B). `contexts` say what the latents see,
        some latents after the other. Without `keep` the features are dropped layer by layer and none are given: all of
        a joint window of a 14B model would be 42 GB. `mask` (latents, latents), True where one may see another, or what
        is added to scores, (b, n, tokens, tokens) or broadcast to it, is for training; inference needs none. With an
        `exchange` the latents (hidden states) are some rows of all, and so is what comes out; features are of some
        heads.
        """
        if self.is_first:
            x = rearrange(self.patch_embedding(x.to(self.proj_dtype)), "b d f h w -> b f h w d").contiguous()
        time, modulation = self._modulation(timesteps, fps, x.dtype)
        f, h, w = x.shape[1:4]
        seen = max(context.in_layer(self.layers[0], f).num_latents for context in contexts)
        turn = rotation(seen, exchange.num_rows(h), w, self.config.attention_head_dim, x.device,
                        torch.is_grad_enabled())  # fmt: skip
        visible = visible_in(mask, h * w, x.device) if mask is not None and mask.dtype == torch.bool else mask
        features = {}
        for i in self.layers:
            sights = [context.in_layer(i, f) for context in contexts]
            x, left = self.blocks[str(i)](x, modulation, text[i], sights, turn, visible, exchange)
            if keep:
                features[i] = left
        return (self._unembed(x, time) if self.is_last else x), features

    @property
    def proj_dtype(self) -> torch.dtype:
        """The dtype of the projections: that of the run (norms and modulation stay in float32)."""
        return self.condition_embedder.text_embedder.linear_1.weight.dtype

    def _modulation(self, timesteps: Timesteps, fps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedder = self.condition_embedder
        waves = sinusoid(timesteps, self.config.freq_dim).to(embedder.time_embedder.linear_1.weight.dtype)
        time = embedder.time_embedder(waves).to(dtype)
        modulation = embedder.time_proj(F.silu(time)).unflatten(-1, (6, -1))
        if self.config.inject_sample_info:
            index = torch.tensor([[0 if fps == 16 else 1]], device=timesteps.device)
            modulation = modulation + self.fps_projection(self.fps_embedding(index)).unflatten(-1, (6, -1))
        return time, modulation

    def _unembed(self, x: Tensor, time: Tensor) -> Latents:
        table = self.scale_shift_table + time.float()[:, :, None]
        shift, scale = rearrange(table, "b f k d -> k b f 1 1 d")
        x = self.proj_out(modulated(x, shift, scale, self.config.eps).type_as(x))
        _, height, width = self.config.patch_size
        return rearrange(x.float(), "b f h w (p q c) -> b c f (h p) (w q)", p=height, q=width)
