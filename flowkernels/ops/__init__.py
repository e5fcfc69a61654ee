"""The operators. Each has one folder here: reference.py (the truth), autograd.py, and its public face."""

from flowkernels.ops.affine_coupling import affine_coupling as affine_coupling
from flowkernels.ops.maf import maf_forward as maf_forward
from flowkernels.ops.maf import maf_inverse as maf_inverse
from flowkernels.ops.masked_linear import masked_linear as masked_linear
