"""Processes that use the package farm: GPU workers, the exporter and the janitor."""
