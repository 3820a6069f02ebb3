"""Terminal output: tables, progress bars, exit codes, signals."""
