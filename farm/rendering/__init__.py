"""Rendering in this process: warm-up, calibration, replay."""
