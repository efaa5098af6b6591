"""longvid: the parts of a long-video diffusion system that one process needs."""

__version__ = "0.1.0"
