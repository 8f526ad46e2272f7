"""``python -m funcdelta`` is the command ``funcdelta``."""

import sys

from .apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
