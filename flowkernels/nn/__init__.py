"""Layers of flows and what they are made of."""

from flowkernels.nn import masks as masks
