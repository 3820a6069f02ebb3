"""The render worker: a parent, and a child with the device and its pipeline."""
