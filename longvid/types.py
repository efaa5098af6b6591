"""The axis legend: every tensor that crosses a module's border is one of these.

    b  batch                 f  latent frames            c  latent channels
    h  latent height         w  latent width             l  text tokens
    t  pixel frames          H  pixel height             W  pixel width              p  pixel channels

The annotations are plain strings on `torch.Tensor`; under pytest `tests/conftest.py` checks ranks and equal axes at
every call of a public function, in production they cost nothing.
"""

from typing import Annotated

from torch import Tensor

Latents = Annotated[Tensor, "b c f h w"]
"""Latent video, normalised as the DiT sees it, float32."""

Levels = Annotated[Tensor, "b f"]
"""Noise level sigma per latent in [0, 1]: 1 is pure noise, 0 is clean. float32."""

Timesteps = Annotated[Tensor, "b f"]
"""What the DiT is told of a level: 1000 sigma, per latent. float32."""

Text = Annotated[Tensor, "b l d"]
"""Text encoder states, zero past the prompt's end."""

Video = Annotated[Tensor, "b p t H W"]
"""Pixels in [-1, 1]."""
