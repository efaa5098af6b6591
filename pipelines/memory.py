"""Memory for time in training: layers that keep their inputs only."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from longvid.models.dit import DiT


def checkpoint_layers(dit: DiT) -> None:
    """Let every layer forget what it computed and compute it again when gradients pass (arXiv 1604.06174)."""
    for layer in dit.blocks.values():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
