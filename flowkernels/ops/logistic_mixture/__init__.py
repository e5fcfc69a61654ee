"""The mixture-of-logistics transform of Flow++, with its log-det."""

from __future__ import annotations

from torch import Tensor

from flowkernels._backend import runs_reference
from flowkernels._checks import COMPUTE_DTYPE, check_float_tensor, check_logdet
from flowkernels._library import needs_grad
from flowkernels.ops.logistic_mixture import reference
from flowkernels.ops.logistic_mixture.autograd import LogisticMixture, forward_op
from flowkernels.scales import ScaleLaw, as_law

__all__ = ["logistic_mixture"]

MAX_COMPONENTS = 64  # csrc/common/logistic_mixture.h: kMaxComponents


def logistic_mixture(
    x: Tensor,
    parameters: Tensor,
    *,
    law: str | ScaleLaw = "tanh",
    min_log_scale: float = -7.0,
    inverse: bool = False,
    logdet: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Flow++'s elementwise transform: the distribution function of a mixture of logistics, a logit, and an affine
    transform.

    With K components of weights pi = softmax(logits), means mu and scales s::

        P(x)   = sum_k pi_k sigmoid((x - mu_k) / s_k)
        y      = sigma logit(P(x)) + shift
        logdet = sum_i log dy_i/dx_i over the last dimension (its negative when `inverse`), in nats

    Everything is calculated from log P and log (1 - P), so both tails are exact. The inverse starts from a bracket
    that the components give and is Newton's method inside of it, bisection where that fails: it always converges.
    Its gradient is that of the implicit function theorem. Between components that are many scales apart the
    transform is flat, and there the inverse is as ill-conditioned as mathematics makes it.

    Args:
        x: (..., D), float64, float32, bfloat16 or float16; halves are calculated in float32.
        parameters: (..., D, 3 K + 2), broadcastable to x's shape and one more dimension: shift, scale, K logits, K
            means, K logarithms of scales. K is 1 to 64.
        law: scale law of sigma: a name or a `ScaleLaw` with its parameters.
        min_log_scale: smaller logarithms of scales are raised to this one, and get no gradient.
        inverse: transform y back to x.
        logdet: (...), a running log-det that this one is added to.

    Returns:
        y (..., D) in x's dtype and logdet (...) in at least float32.

    Raises:
        TypeError, ValueError: the argument, what it was and what it should be.

    Source: Ho et al. 2019 (Flow++), arXiv:1902.00275.
    """
    law = as_law(law)
    check_float_tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x must have at least one dimension, the features, got a scalar")
    check_float_tensor("parameters", parameters, like=x)
    count = parameters.shape[-1] if parameters.dim() else 0
    if count < 5 or (count - 2) % 3 or (count - 2) // 3 > MAX_COMPONENTS:
        raise ValueError(
            f"parameters must have 3 K + 2 numbers per feature in the last dimension, K = 1 to {MAX_COMPONENTS}, "
            f"got shape {tuple(parameters.shape)}"
        )
    full = (*x.shape, count)
    if parameters.shape != full:
        given = tuple(parameters.shape)
        fits = len(given) <= len(full) and all(a in (1, b) for a, b in zip(given[::-1], full[::-1], strict=False))
        if not fits:
            raise ValueError(
                f"parameters must broadcast to {full}, x's shape and the mixture's parameters, got {given}"
            )
        parameters = parameters.expand(full)
    dtype = COMPUTE_DTYPE[x.dtype]
    check_logdet(logdet, x)

    features, count_rows = x.shape[-1], x.shape[:-1].numel()
    rows = x.to(dtype).reshape(count_rows, features)
    theta = parameters.to(dtype).reshape(count_rows, features, count)
    running = None if logdet is None else logdet.to(dtype).reshape(count_rows)
    args = (rows, theta, running, float(min_log_scale), law.code, law.numbers, inverse)
    if runs_reference(x):
        y, total = reference.logistic_mixture(*args)
    elif needs_grad(x, parameters, logdet):
        y, total = LogisticMixture.apply(*args)
    else:
        y, total = forward_op(*args)
    return y.reshape(x.shape).to(x.dtype), total.reshape(x.shape[:-1])
