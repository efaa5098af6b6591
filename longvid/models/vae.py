"""The causal video VAE: pixels to latents and back, whole or as a stream.

Architecture and parameter names are diffusers' `AutoencoderKLWan` (Wan2.1, arXiv 2503.20314, section 4.1; `is_residual`
and `patch_size` are Wan2.2's). One latent stands for the first frame and one for each further 4. Every convolution is
causal in time, so a video is decoded in pieces of any length: a call returns what the next one needs. The module knows
no files, no noise and no text.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from longvid.models.vae_config import TEMPORAL_FACTOR, VAEConfig
from longvid.models.vae_layers import (
    AttentionBlock,
    CausalConv3d,
    Downsample,
    MidBlock,
    ResidualBlock,
    ResidualDownBlock,
    ResidualUpBlock,
    RMSNorm,
    Stream,
    UpBlock,
    Upsample,
    VAEState,
)
from longvid.types import Latents, Video

PIECE_PIXELS = 2**18
"""Pixels of video that are decoded at a time, unless one latent has more: small latents one by one take a CPU 1.4 times
as long."""


class Encoder(nn.Module):
    """Patched pixels to mean and log-variance, `2 z_dim` channels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, dims[0], 3)
        self.down_blocks = nn.ModuleList()
        temporal = (*config.temperal_downsample, None)
        for depth, ((in_dim, out_dim), in_time) in enumerate(zip(pairwise(dims), temporal, strict=True)):
            downsample = None if in_time is None else Downsample(out_dim, temporal=in_time)
            if config.is_residual:
                self.down_blocks.append(ResidualDownBlock(in_dim, out_dim, config.num_res_blocks, downsample))
                continue
            for block_dim in [in_dim] + [out_dim] * (config.num_res_blocks - 1):
                self.down_blocks.append(ResidualBlock(block_dim, out_dim))
                if 0.5**depth in config.attn_scales:
                    self.down_blocks.append(AttentionBlock(out_dim))
            if downsample is not None:
                self.down_blocks.append(downsample)
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, in_channels) -> (b, t', h', w', 2 z_dim)`."""
        x = self.conv_in(x, stream)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        return self.conv_out(x, stream, self.norm_out)


class Decoder(nn.Module):
    """Latents to patched pixels. Its back is what works at the full size, its front all before that."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        mults = config.dim_mult[::-1]
        dims = [(config.decoder_base_dim or config.base_dim) * mult for mult in (mults[0], *mults)]
        self.conv_in = CausalConv3d(config.z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        temporal = (*config.temperal_downsample[::-1], None)
        for depth, ((in_dim, out_dim), in_time) in enumerate(zip(pairwise(dims), temporal, strict=True)):
            upsample = None
            if in_time is not None:
                upsample = Upsample(out_dim, out_dim if config.is_residual else out_dim // 2, temporal=in_time)
            if config.is_residual:
                self.up_blocks.append(ResidualUpBlock(in_dim, out_dim, config.num_res_blocks, upsample))
            else:
                halved = in_dim // 2 if depth else in_dim
                self.up_blocks.append(UpBlock(halved, out_dim, config.num_res_blocks, upsample))
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], config.out_channels, 3)

    def front(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t, h, w, z_dim) -> (b, t', h', w', c)`: of full size already, in frames and pixels."""
        x = self.mid_block(self.conv_in(x, stream), stream)
        for block in self.up_blocks[:-1]:
            x = block(x, stream)
        return x

    def back(self, x: Tensor, stream: Stream) -> Tensor:
        """`(b, t', h', w', c) -> (b, t', h', w', out_channels)`."""
        return self.conv_out(self.up_blocks[-1](x, stream), stream, self.norm_out)


class VAE(nn.Module):
    """The whole autoencoder. Its state dict is diffusers' `AutoencoderKLWan`'s of the same configuration."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def decoding_in(self, dtype: torch.dtype) -> "VAE":
        """This VAE with the weights that decode, and with them all that is computed of latents, in `dtype`."""
        self.post_quant_conv.to(dtype)
        self.decoder.to(dtype)
        return self

    def back_alone(self) -> "VAE":
        """This VAE with no more than `decode_back` needs."""
        self.encoder = self.quant_conv = self.post_quant_conv = nn.Identity()
        self.decoder.conv_in = self.decoder.mid_block = nn.Identity()
        for i in range(len(self.decoder.up_blocks) - 1):
            self.decoder.up_blocks[i] = nn.Identity()
        return self

    @torch.no_grad()
    def decode(self, latents: Latents, state: VAEState | None = None) -> tuple[Video, VAEState]:
        """Pixels of the next latents of a stream, float32 in [-1, 1], and what the call after needs.

        Works on few latents at a time, so its memory does not grow with the call; in float32 on a CPU latent by latent,
        so that a video has the same bits however it is cut. A video's first latent gives 1 frame, every other gives 4.

        Args:
            latents: `(b, z_dim, f, h, w)`, f >= 1, normalised as the DiT sees them.
            state: what the call before returned; None at the start of a video.

        Raises:
            ValueError: the latents do not have `z_dim` channels, or there are none.
        """
        stream, frames = Stream(state), []
        for piece in self._pieces(latents, is_start=stream.is_start):
            frames.append(self._pixels(self._front(piece, stream), stream))
            state = stream.advance()
        return torch.cat(frames, 2), state

    @torch.no_grad()
    def decode_front(self, latents: Latents, state: VAEState | None = None) -> Iterator[tuple[Tensor, VAEState]]:
        """`decode` up to where `decode_back` goes on, elsewhere perhaps: features of one piece of the latents after the
        other, `(b, t, H, W, c)` as `features_of` says, and what comes after that piece needs.

        Raises as `decode` does.
        """
        stream = Stream(state)
        for piece in self._pieces(latents, is_start=stream.is_start):
            features = self._front(piece, stream)
            yield features, stream.advance()

    @torch.no_grad()
    def decode_back(self, features: Iterable[Tensor], state: VAEState | None = None) -> tuple[Video, VAEState]:
        """What `decode` gives, of what `decode_front` gave of the same latents; the states of both are their own."""
        stream, frames = Stream(state), []
        for piece in features:
            frames.append(self._pixels(piece, stream))
            state = stream.advance()
        return torch.cat(frames, 2), state

    def features_of(self, size: tuple[int, ...], *, is_start: bool) -> tuple[list[tuple[int, ...]], torch.dtype]:
        """Shapes and dtype of what `decode_front` gives of latents of that size, (b, z_dim, f, h, w)."""
        like = self.decoder.conv_out.weight.new_empty(size)
        pieces = [piece.shape[1] for piece in self._pieces(like, is_start=is_start)]
        frames = [1 if is_start and i == 0 else TEMPORAL_FACTOR * piece for i, piece in enumerate(pieces)]
        scale = 2 ** (len(self.config.dim_mult) - 1)
        shapes = [(size[0], num, scale * size[3], scale * size[4], self.config.front_channels) for num in frames]
        return shapes, self.decoder.conv_out.weight.dtype

    @torch.no_grad()
    def encode(self, video: Video, state: VAEState | None = None) -> tuple[Latents, VAEState]:
        """Normalised latents (the posterior's mode) of the next frames of a stream, and what the call after needs.

        Args:
            video: `(b, 3, t, H, W)` in [-1, 1]; 4n + 1 frames at the start of a video, 4n after that. H and W are
                multiples of `spatial_factor`.
            state: what the call before returned; None at the start of a video.

        Raises:
            ValueError: the video's size does not fit.
        """
        self._check_video(video, is_start=state is None)
        stream, latents = Stream(state), []
        num_first = video.shape[2] % TEMPORAL_FACTOR
        for frames in video.split([num_first] * num_first + [TEMPORAL_FACTOR] * (video.shape[2] // TEMPORAL_FACTOR), 2):
            latents.append(self._encode(frames, stream)[0])
            state = stream.advance()
        mu = torch.cat(latents, 2)
        mean, std = self._statistics(mu)
        return (mu - mean) / std, state

    def moments(self, video: Video) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each `(b, z_dim, f, h, w)` and not normalised, of a whole clip; for training.

        Raises:
            ValueError: the clip does not have 4n + 1 frames, or its height or width does not fit.
        """
        self._check_video(video, is_start=True)
        return self._encode(video, Stream(keep=False))

    def denormalised(self, latents: Latents) -> Tensor:
        """Latents as the decoder sees them, of those that the DiT sees."""
        mean, std = self._statistics(latents)
        return latents.float() * std + mean

    def reconstruct(self, z: Tensor, state: VAEState | None = None) -> Video:
        """Pixels, not clamped, of all of a clip's latents `(b, z_dim, f, h, w)`, not normalised; for training.

        They go on from the `state` that a call of `decode` has left.

        Raises:
            ValueError: the latents do not have `z_dim` channels, or there are none.
        """
        self._check_channels(z, "latents", self.config.z_dim)
        x = rearrange(z, "b c f h w -> b f h w c").to(self.decoder.conv_out.weight.dtype)
        state = state and VAEState(state.past, {})  # no gradient goes through kernels that were prepared before
        stream = Stream(state, keep=False)
        return self._back(self._front(x, stream), stream).float()

    def _encode(self, video: Video, stream: Stream) -> tuple[Tensor, Tensor]:
        p = self.config.patch_size or 1
        x = rearrange(video, "b c t (h p) (w q) -> b t h w (c q p)", p=p, q=p)
        x = self.encoder(x.to(self.encoder.conv_in.weight.dtype), stream)
        mean, log_variance = rearrange(self.quant_conv(x, stream).float(), "b f h w (n c) -> n b c f h w", n=2)
        return mean, log_variance.clamp(-30, 20)

    def _front(self, z: Tensor, stream: Stream) -> Tensor:
        return self.decoder.front(self.post_quant_conv(z, stream), stream)

    def _back(self, features: Tensor, stream: Stream) -> Tensor:
        p = self.config.patch_size or 1
        return rearrange(self.decoder.back(features, stream), "b t h w (c q p) -> b c t (h p) (w q)", p=p, q=p)

    def _pixels(self, features: Tensor, stream: Stream) -> Video:
        return self._back(features, stream).float().clamp_(-1, 1)

    def _pieces(self, latents: Latents, *, is_start: bool) -> Iterator[Tensor]:
        """What is decoded at a time, `(b, f, h, w, z_dim)` as the decoder sees it; a video's first latent alone, since
        it has another number of frames."""
        self._check_channels(latents, "latents", self.config.z_dim)
        z = self.denormalised(latents).to(self.decoder.conv_out.weight.dtype)
        z = rearrange(z, "b c f h w -> b f h w c")
        first, rest = z.split([1, z.shape[1] - 1], 1) if is_start else (z[:, :0], z)
        pixels = len(z) * z.shape[2:4].numel() * self.config.spatial_factor**2 * TEMPORAL_FACTOR
        exact = z.dtype == torch.float32 and z.device.type == "cpu"
        pieces = rest.split(1 if exact else max(1, PIECE_PIXELS // pixels), 1)
        return (piece for piece in (first, *pieces) if piece.shape[1])

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents, `(z_dim, 1, 1, 1)`, float32."""
        both = torch.tensor([self.config.latents_mean, self.config.latents_std], device=like.device)
        mean, std = both[..., None, None, None]
        return mean, std

    def _check_channels(self, x: Tensor, name: str, channels: int) -> None:
        if x.ndim != 5 or x.shape[1] != channels or not x.shape[2]:
            raise ValueError(f"{name} of shape {tuple(x.shape)} must be (batch, {channels}, at least 1, height, width)")

    def _check_video(self, video: Tensor, *, is_start: bool) -> None:
        self._check_channels(video, "video", self.config.in_channels // (self.config.patch_size or 1) ** 2)
        num_frames, height, width = video.shape[2:]
        extra = num_frames % TEMPORAL_FACTOR
        if extra != int(is_start):
            rule, near = ("4n + 1", 1) if is_start else ("4n", 0)
            near = max(num_frames - (num_frames - near) % TEMPORAL_FACTOR, near or TEMPORAL_FACTOR)
            where = "at the start of" if is_start else "further on in"
            raise ValueError(f"{num_frames} frames {where} a video must be {rule}; try {near}")
        factor = self.config.spatial_factor
        if height % factor or width % factor:
            near = [max(size // factor, 1) * factor for size in (height, width)]
            raise ValueError(f"video of {height}x{width} must be a multiple of {factor}; try {near[0]}x{near[1]}")
