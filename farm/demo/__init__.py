"""The demo: a catalog, a small trained model, and the scripts that made it."""
