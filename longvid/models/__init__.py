"""The networks: the video DiT, its attention and cache, the streaming VAE and the text encoder."""
