"""What can be rendered: the catalog, the families, their parameters and checkpoints."""
