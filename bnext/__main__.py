"""`python -m bnext`: the same as the command `bnext`."""

import sys

from bnext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
