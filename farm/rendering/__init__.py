"""Rendering in this process: warm-up, calibration and replay."""
