"""Printing: tables, progress bars, exit codes, signals."""
