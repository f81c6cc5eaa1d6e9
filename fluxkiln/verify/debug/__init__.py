"""Where inside a part an error starts."""
