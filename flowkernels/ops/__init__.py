"""The operators. Each has one folder here: reference.py (the truth), autograd.py, and its public face."""

from flowkernels.ops.actnorm import actnorm as actnorm
from flowkernels.ops.affine_coupling import affine_coupling as affine_coupling
from flowkernels.ops.dequantize import bits_per_dim as bits_per_dim
from flowkernels.ops.dequantize import dequantize as dequantize
from flowkernels.ops.discretized_logistic_mixture import discretized_logistic_mixture as discretized_logistic_mixture
from flowkernels.ops.gumbel_argmax import gumbel_argmax as gumbel_argmax
from flowkernels.ops.gumbel_softmax import gumbel_softmax as gumbel_softmax
from flowkernels.ops.invertible_conv1x1 import invertible_conv1x1 as invertible_conv1x1
from flowkernels.ops.logistic_mixture import logistic_mixture as logistic_mixture
from flowkernels.ops.maf import maf_forward as maf_forward
from flowkernels.ops.maf import maf_inverse as maf_inverse
from flowkernels.ops.masked_linear import masked_linear as masked_linear
from flowkernels.ops.rq_spline import rq_spline as rq_spline
from flowkernels.ops.straight_through import straight_through as straight_through
from flowkernels.ops.vector_quantize import nearest_code as nearest_code
from flowkernels.ops.vector_quantize import vector_quantize as vector_quantize
from flowkernels.ops.vector_quantize import vector_quantize_ema_ as vector_quantize_ema_
