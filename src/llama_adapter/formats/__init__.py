"""Adapters on disk, one file a format."""
