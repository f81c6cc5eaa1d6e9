"""Images from a bundle: as stages in Python, for the command line, and for the local page."""
