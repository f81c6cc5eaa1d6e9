"""Bundles in model registries: OCI image layouts, OCI registries, the Hugging Face Hub."""
