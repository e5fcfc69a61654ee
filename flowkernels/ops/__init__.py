"""The operators. Each has one folder here: reference.py (the truth), autograd.py, and its public face."""

from flowkernels.ops.affine_coupling import affine_coupling as affine_coupling
