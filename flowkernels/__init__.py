"""flowkernels: fused operators for normalizing flows and latent-variable models in PyTorch."""

from flowkernels import _library, nn, ops, scales
from flowkernels._backend import available_backends, use_backend
from flowkernels._version import __version__

_library.load_compiled()

__all__ = ["__version__", "available_backends", "nn", "ops", "scales", "use_backend"]
