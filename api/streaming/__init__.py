"""Streams of events, and calls that wait: all read one feed."""
