"""Layers, written against the operators."""

from flowkernels.nn import masks as masks
from flowkernels.nn.actnorm import ActNorm as ActNorm
from flowkernels.nn.actnorm import Invertible1x1 as Invertible1x1
from flowkernels.nn.autoregressive import AutoregressiveTransform as AutoregressiveTransform
from flowkernels.nn.conditioners import MLP as MLP
from flowkernels.nn.conditioners import ConvNet as ConvNet
from flowkernels.nn.coupling import CouplingTransform as CouplingTransform
from flowkernels.nn.made import MADE as MADE
from flowkernels.nn.masked_linear import MaskedLinear as MaskedLinear
from flowkernels.nn.reshaping import FactorOut as FactorOut
from flowkernels.nn.reshaping import Permutation as Permutation
from flowkernels.nn.reshaping import Squeeze as Squeeze
from flowkernels.nn.vector_quantizer import VectorQuantizer as VectorQuantizer
