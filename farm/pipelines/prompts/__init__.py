"""Prompts: embeddings, and the syntax of Compel."""
