"""flowkernels: fused operators for normalizing flows and latent-variable models in PyTorch."""

from flowkernels import _library, integrations, models, nn, objectives, ops, random, scales
from flowkernels._backend import available_backends, use_backend
from flowkernels._explain import explain
from flowkernels._version import __version__
from flowkernels.integrations import accelerate, accelerated, deaccelerate
from flowkernels.plan import Plan

_library.load_compiled()

__all__ = [
    "Plan",
    "__version__",
    "accelerate",
    "accelerated",
    "available_backends",
    "deaccelerate",
    "explain",
    "integrations",
    "models",
    "nn",
    "objectives",
    "ops",
    "random",
    "scales",
    "use_backend",
]
