"""OpenAI's image API at /openai/v1, for programs that have a client of it."""
