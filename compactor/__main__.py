"""Runs the umbrella command: ``python -m compactor``."""

from __future__ import annotations

from compactor.cli.app import main

if __name__ == "__main__":
    main()
