"""Pipelines in memory: loaded, pinned on a device, compiled."""
