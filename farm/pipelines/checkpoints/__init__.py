"""Checkpoint files: read and checked before any weight is loaded."""
