"""A build: its context, its plan, and what is made, verified, finished and published."""
