"""Ctrl-C and SIGTERM end a command soon, whatever computes then.

Python raises KeyboardInterrupt when the main thread comes back to it, which may take as long as a product of matrices.
So a thread is woken by the signal itself: it stops what runs outside of this process at once, and this process when it
has not ended by then. Nothing is lost: stores and folders take what is finished, at any time.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# to clean up behind a KeyboardInterrupt
SECONDS = 1.0


def end_soon(last: Callable[[], int], seconds: float = SECONDS) -> None:
    """From now on a signal that ends the command ends it within `seconds`; `last` says so and gives the exit code."""
    woken, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while number := os.read(woken, 1):
            # One that somebody else handles, a server say, is none of ours.
            if number[0] not in ENDING or signal.getsignal(number[0]) is not signal.default_int_handler:
                continue
            stop_tools()
            time.sleep(seconds)
            stop_tools()
            code = last()
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # bars hide the cursor
                sys.stderr.flush()
            os._exit(code)

    threading.Thread(target=watch, name="interrupt", daemon=True).start()


def stop_tools() -> None:
    """Stop every compiler and worker that was started; nothing is imported for it."""
    process = sys.modules.get("fluxkiln.compile.process")
    if process is not None:
        process.stop_all()
