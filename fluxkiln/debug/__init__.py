"""Where inside a part an error starts, and what to do about it."""
