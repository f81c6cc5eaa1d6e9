"""`python -m fluxkiln`: the command `fluxkiln`."""

import sys

from fluxkiln.cli.main import main

if __name__ == "__main__":
    code = main()
    # Python ends `-m` by the signal where a library was interrupted inside of an exec, unless another one follows.
    exec("")
    sys.exit(code)
