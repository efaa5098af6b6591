"""Costs of passes from operations and bytes, for machines that are not at hand. Plain Python; seconds and bytes.

A roofline whose matrices reach a stated share of the processor's peak. Left out: launches of kernels, norms and other
small work (they are in the share), contention of links, and that sharers of heads get small matrices.
"""

from dataclasses import dataclass

from parallel.cost import Costs, ModelShape


@dataclass(frozen=True, kw_only=True)
class Processor:
    """Peak operations and bytes of memory a second, and the share of the peak that a model's layers reach."""

    name: str
    peak: float
    memory_bandwidth: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Link:
    """Between any two processes, all alike: latency in seconds, bytes a second in each direction."""

    name: str
    latency: float
    bandwidth: float


def layer_operations(shape: ModelShape, text_tokens: int) -> tuple[float, float]:
    """Operations of a layer per latent, and per pair of latents of which one sees the other.

    Of a token: queries, keys, values and output of self-attention, query and output of cross-attention (keys and values
    of text are computed once), the feed-forward; scores and their sum over the text. Two per multiplication.
    """
    tokens, dim = shape.tokens_per_latent, shape.dim
    per_latent = tokens * (2 * (6 * dim**2 + 2 * dim * shape.ffn_dim) + 4 * text_tokens * dim)
    return per_latent, 4.0 * dim * tokens**2


def roofline_costs(shape: ModelShape, processor: Processor, link: Link, *, text_tokens: int, decode: float) -> Costs:
    """Costs of passes; `decode` is seconds of the VAE for a latent. Each layer reads its weights once a pass."""
    rate = processor.peak * processor.share
    per_latent, per_pair = layer_operations(shape, text_tokens)
    patch = 2 * shape.tokens_per_latent * shape.dim * shape.latent_bytes / 4 / shape.tokens_per_latent
    solver = 20 * shape.latent_bytes / processor.memory_bandwidth
    return Costs(fixed=shape.layer_bytes / processor.memory_bandwidth, per_latent=per_latent / rate,
                 per_pair=per_pair / rate, first=patch / rate, last=patch / rate + solver, decode=decode,
                 latency=link.latency, bandwidth=link.bandwidth)  # fmt: skip
