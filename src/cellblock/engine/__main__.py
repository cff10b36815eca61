"""``python3 -m cellblock`` is the ``cellblock`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
