"""The toy model: its classes as published in `published`, what fluxkiln asks of a model in `model`."""
