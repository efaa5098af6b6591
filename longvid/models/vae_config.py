"""The shape of a VAE, as released folders describe it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

TEMPORAL_FACTOR = 4
"""Frames of a latent, after the first, which has one."""

# Wan2.1's statistics of its 16 latent channels, as its released vae/config.json has them.
WAN_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of a VAE; names and defaults are those of diffusers' `vae/config.json`.

    `in_channels` and `out_channels` count a patch: 3 patch_size^2. `scale_factor_*` may be left out (None) and then
    follow from the rest. `clip_output` is carried for Wan2.2's folders; like diffusers, `decode` always clamps.

    Raises:
        ValueError: a value that is impossible or cannot be honoured.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = None
    scale_factor_spatial: int | None = None
    clip_output: bool = True

    def __post_init__(self):
        for name in ("dim_mult", "attn_scales", "temperal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for message in self._faults():
            raise ValueError(message)
        object.__setattr__(self, "scale_factor_temporal", self.temporal_factor)
        object.__setattr__(self, "scale_factor_spatial", self.spatial_factor)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along height and width."""
        return 2 ** (len(self.dim_mult) - 1) * (self.patch_size or 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent after the first."""
        return TEMPORAL_FACTOR

    @property
    def front_channels(self) -> int:
        """Channels that the decoder's front hands on to its back."""
        channels = (self.decoder_base_dim or self.base_dim) * self.dim_mult[1]
        return channels if self.is_residual else channels // 2

    @classmethod
    def from_dict(cls, config: dict) -> "VAEConfig":
        """What a `vae/config.json` says; keys that start with "_" are diffusers' own.

        Raises:
            ValueError: an unknown key, or a value that cannot be honoured.
        """
        known = {field.name for field in fields(cls)}
        config = {key: value for key, value in config.items() if not key.startswith("_")}
        for key in config:
            if key not in known:
                raise ValueError(f"VAE config has the unknown key {key!r}; it may hold {', '.join(sorted(known))}")
        return cls(**config)

    def to_dict(self) -> dict:
        """What a `vae/config.json` holds, less the keys that start with "_". `clip_output` only where it is false."""
        config = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if self.clip_output:
            del config["clip_output"]
        return config

    def _faults(self) -> Iterator[str]:
        """What is wrong, one line each."""
        yield from self._size_faults()
        yield from self._time_and_latent_faults()
        if self.is_residual:
            yield from self._residual_faults()

    def _size_faults(self) -> Iterator[str]:
        counts = {name: getattr(self, name) for name in ("base_dim", "z_dim", "num_res_blocks")}
        counts |= {name: getattr(self, name) or 1 for name in ("decoder_base_dim", "patch_size")}
        counts |= {f"dim_mult[{i}]": mult for i, mult in enumerate(self.dim_mult)}
        for name, value in counts.items():
            if not isinstance(value, int) or value < 1:
                yield f"VAE {name}={value!r} must be a whole number of at least 1"
        if self.dropout:
            yield f"VAE dropout={self.dropout} is not supported; use 0.0"
        area = (self.patch_size or 1) ** 2
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) < 1 or getattr(self, name) % area:
                yield f"VAE {name}={getattr(self, name)} must be a multiple of patch_size^2={area}; try {3 * area}"
        if self.scale_factor_spatial not in (None, self.spatial_factor):
            yield f"VAE scale_factor_spatial={self.scale_factor_spatial}: the other keys make it {self.spatial_factor}"

    def _time_and_latent_faults(self) -> Iterator[str]:
        if len(self.temperal_downsample) != len(self.dim_mult) - 1 or sum(self.temperal_downsample) != 2:
            given = list(self.temperal_downsample)
            yield (
                f"VAE temperal_downsample={given} must hold {len(self.dim_mult) - 1} values, one less than dim_mult, "
                "of which 2 are true (frames are compressed by 4); for 4 sizes [false, true, true] works"
            )
        if self.scale_factor_temporal not in (None, TEMPORAL_FACTOR):
            yield f"VAE scale_factor_temporal={self.scale_factor_temporal} must be {TEMPORAL_FACTOR}"
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                yield f"VAE {name} has {len(getattr(self, name))} values; z_dim={self.z_dim} needs {self.z_dim}"
        if min(self.latents_std) <= 0:
            yield f"VAE latents_std={list(self.latents_std)} must be positive; 1.0 everywhere works"

    def _residual_faults(self) -> Iterator[str]:
        """Shortcuts average or repeat channels in equal groups: `narrow` channels, times `factor`, make `wide` ones."""
        factors = [4 * (1 + in_time) for in_time in self.temperal_downsample]
        down = zip(pairwise((1, *self.dim_mult)), (*factors, 1), strict=True)
        up = zip(pairwise((self.dim_mult[-1], *self.dim_mult[:0:-1])), factors[::-1], strict=True)
        groups = [(narrow, wide, factor) for (narrow, wide), factor in down]
        for narrow, wide, factor in groups + [(narrow, wide, factor) for (wide, narrow), factor in up]:
            if narrow * factor % wide:
                yield (
                    f"VAE dim_mult={list(self.dim_mult)} with is_residual: {narrow} * {factor} must be a multiple of "
                    f"{wide}; [1, 2, 4, 4] works"
                )
