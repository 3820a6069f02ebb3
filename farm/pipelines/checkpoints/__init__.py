"""Checkpoints as files: read and checked before a weight is loaded."""
