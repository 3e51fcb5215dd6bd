"""``python -m lightning_gradguard.cli``, where ``gradguard`` is not on the path."""

from __future__ import annotations

import sys

from lightning_gradguard.cli import main

if __name__ == "__main__":
    sys.exit(main())
