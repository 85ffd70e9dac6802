"""`python -m mimo_local` is `mimo`."""

from __future__ import annotations

import sys

from mimo_local.cli import main

if __name__ == "__main__":
    sys.exit(main())
