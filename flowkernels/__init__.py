"""flowkernels: fused operators for normalizing flows and latent-variable models in PyTorch."""

from flowkernels import _library, models, nn, ops, scales
from flowkernels._backend import available_backends, use_backend
from flowkernels._version import __version__
from flowkernels.plan import Plan

_library.load_compiled()

__all__ = ["Plan", "__version__", "available_backends", "models", "nn", "ops", "scales", "use_backend"]
