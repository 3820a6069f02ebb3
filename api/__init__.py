"""The HTTP API and the dashboard: thin, over farm."""
