"""Reference recording, metrics, parity ladder, reports."""
