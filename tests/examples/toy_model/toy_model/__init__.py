"""The toy model: diffusers' classes of it in `published`, what fluxkiln asks of a model in `model`."""
