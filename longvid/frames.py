"""Videos as the VAE has them <-> frames as files have them: float in [-1, 1], channels first <-> uint8, last."""

from einops import rearrange
from torch import Tensor, uint8

from longvid.types import Video


def to_frames(video: Video) -> Tensor:
    """uint8 `(b, t, H, W, p)`, on the same device."""
    return rearrange(((video + 1) * 127.5).round().clamp(0, 255).to(uint8), "b p t H W -> b t H W p")


def to_video(frames: Tensor) -> Video:
    """Of uint8 `(b, t, H, W, p)`, float32, on the same device."""
    return rearrange(frames, "b t H W p -> b p t H W").float() / 127.5 - 1
