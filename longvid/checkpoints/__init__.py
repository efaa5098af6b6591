"""Readers and writers of released checkpoint formats, one file per format."""
