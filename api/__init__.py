"""The HTTP API and the dashboard: a thin layer over the package `farm`."""
