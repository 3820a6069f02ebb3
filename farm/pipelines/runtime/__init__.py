"""Pipelines in memory: loading them, pinning them on a device, compiling them."""
