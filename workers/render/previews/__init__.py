"""Previews of the batch on the device, while somebody watches its jobs."""
