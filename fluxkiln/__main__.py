"""`python -m fluxkiln`: the command `fluxkiln`."""

import sys

from fluxkiln.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
