"""Dual parallelism: frame blocks and model layers over processes, each with its own features."""
