"""The report: one document, one page, no network."""
