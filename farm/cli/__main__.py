"""Run `farm` as `python -m farm.cli`."""

from farm.cli import main

if __name__ == "__main__":
    main()
