"""Layers, written against the operators."""

from flowkernels.nn import masks as masks
from flowkernels.nn.autoregressive import AutoregressiveTransform as AutoregressiveTransform
from flowkernels.nn.made import MADE as MADE
from flowkernels.nn.masked_linear import MaskedLinear as MaskedLinear
from flowkernels.nn.vector_quantizer import VectorQuantizer as VectorQuantizer
