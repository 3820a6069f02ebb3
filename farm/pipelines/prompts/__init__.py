"""Prompts as embeddings, and Compel's syntax."""
