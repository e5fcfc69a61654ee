"""The demonstrations: one module per model, each with ``run(options)``, on what `common`, `report`, `latent` and
`density` have for all of them.

A module is found by its name: ``flowkernels/demo/<model>.py`` is what ``python -m flowkernels demo --model <model>``
runs. It may name its ``STUDIES``, the values of ``--study``. Importing this package imports none of them, so that it
needs neither scikit-learn nor matplotlib.
"""

from __future__ import annotations

import pkgutil

_SHARED = ("common", "density", "estimators", "latent", "report")


def models() -> list[str]:
    """The names of the models that have a demonstration."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name not in _SHARED)
