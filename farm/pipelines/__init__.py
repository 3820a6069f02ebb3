"""Pipelines: the catalog, the families, their parameters and their checkpoints."""
