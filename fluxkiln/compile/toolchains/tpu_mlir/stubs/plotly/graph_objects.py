"""Imported as `go`; nothing of it is used before `make_subplots` has refused."""
