"""The ELBO of a model with categorical latents, its gradient by the estimator that one word names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowkernels._checks import check_choice, check_float_tensor
from flowkernels.objectives.score_function import leave_one_out, score_function_surrogate
from flowkernels.ops import gumbel_argmax, gumbel_softmax, straight_through
from flowkernels.random import Seed, gumbel

ESTIMATORS = ("gumbel", "gumbel_straight_through", "straight_through", "score_function", "rebar", "exact")

# Enumerating more latents than this is a mistake, not a wish.
_MOST = 1 << 16

Baseline = str | Tensor | Callable[[Tensor], Tensor] | None


def categorical_entropy(logits: Tensor, dim: int = -1) -> Tensor:
    """H = -sum p log p in nats, for p = softmax(logits); a category of -inf adds nothing."""
    log_p = logits.log_softmax(dim)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim)


def every_latent(latents: int, categories: int, *, like: Tensor) -> Tensor:
    """All n = categories^latents values of z as one-hot vectors, (n, latents, categories), in `like`'s dtype."""
    total = categories**latents
    if total > _MOST:
        raise ValueError(f"{categories}^{latents} latents are too many to enumerate; at most {_MOST} are")
    number = torch.arange(total, device=like.device)
    digits = [(number // categories**i) % categories for i in reversed(range(latents))]
    return torch.nn.functional.one_hot(torch.stack(digits, -1), categories).to(like.dtype)


def _log_q(log_p: Tensor, z: Tensor) -> Tensor:
    """log q(z) summed over the latents; linear in z, which extends it to relaxed z."""
    return (z * log_p.masked_fill(log_p == -math.inf, 0.0)).sum((-2, -1))


def elbo_discrete(
    logits: Tensor,
    log_likelihood: Callable[[Tensor], Tensor],
    *,
    estimator: str = "gumbel",
    tau: float | Tensor = 1.0,
    samples: int = 1,
    baseline: Baseline = None,
    eta: float | Tensor = 1.0,
    entropy: str = "exact",
    seed: Seed = None,
) -> Tensor:
    r"""E_q[log p(x|z)] - KL(q(z|x) | uniform) for factorised latents z in {1..d}^k, in nats::

        KL = k log d - H(q)

    The result is differentiable by the parameters of `log_likelihood` and by `logits`; how the latter goes through the
    sampling is the estimator's business:

    ============================  =====================================  ==============================================
    gumbel                        z = softmax((logits + g) / tau)        biased, the less the smaller tau; the value
                                                                         is that of the relaxed model
    gumbel_straight_through       z one-hot, gradient of the relaxed z   exact value, biased gradient
    straight_through              z ~ q one-hot, gradient as if z = q    exact value, biased gradient
    score_function                z ~ q one-hot, REINFORCE               unbiased, noisy; see `baseline`
    rebar                         the same, and the relaxed z as         unbiased, at any tau and eta; 3 evaluations
                                  control variate
    exact                         every z, weighted by q(z)              exact; d^k evaluations
    ============================  =====================================  ==============================================

    Args:
        logits: (B, k, d), of q(z|x) = prod softmax(logits).
        log_likelihood: one-hot (or relaxed) z (S, B, k, d) -> log p(x|z) (S, B).
        estimator: one of `ESTIMATORS`.
        tau: temperature of the gumbel estimators and of rebar.
        samples: S; not for exact.
        baseline: for score_function: None, "leave_one_out" (needs samples >= 2), a tensor, or a callable of the values
            such as `MovingAverage`.
        eta: how much of rebar's control variate is taken; 0 leaves the score function alone.
        entropy: "exact" takes H(q) in closed form, "sampled" -log q(z) of the samples.
        seed: see `flowkernels.random.draw_stream`.

    Returns:
        (B,).

    Sources: Jang et al. 2017, arXiv:1611.01144; Bengio et al. 2013, arXiv:1308.3432; Mnih & Gregor 2014,
    arXiv:1402.0030; Tucker et al. 2017, arXiv:1703.07370.
    """
    check_float_tensor("logits", logits)
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape (batch, latents, categories), got {tuple(logits.shape)}")
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("entropy", entropy, ("exact", "sampled"))
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if baseline is not None and estimator != "score_function":
        raise ValueError(f"baseline is for estimator 'score_function', got it with {estimator!r}")
    _, latents, categories = logits.shape
    log_p = logits.log_softmax(-1)
    prior = -latents * math.log(categories)

    if estimator == "exact":
        z = every_latent(latents, categories, like=logits)[:, None].expand(-1, logits.shape[0], -1, -1)
        log_q = torch.where((z * log_p.exp()).sum(-1).prod(-1) > 0, _log_q(log_p, z), -math.inf)
        weighted = log_q.exp() * log_likelihood(z)
        return weighted.sum(0) + categorical_entropy(logits).sum(-1) + prior

    many = logits.expand(samples, *logits.shape)
    correction: Tensor | float = 0.0
    if estimator == "gumbel":
        z = gumbel_softmax(many, tau, seed=seed)
    elif estimator == "gumbel_straight_through":
        z = gumbel_softmax(many, tau, hard=True, seed=seed)
    elif estimator == "straight_through":
        z = straight_through(log_p.exp().expand_as(many), "categorical", sample=True, seed=seed)
    elif estimator == "score_function":
        index, _ = gumbel_argmax(logits.detach(), samples, seed=seed)
        z = torch.nn.functional.one_hot(index, categories).movedim(2, 0).to(logits.dtype)
    else:
        z, *relaxed = _rebar_samples(log_p.expand_as(many), tau, seed)
    if estimator == "rebar":
        value, free, given = log_likelihood(torch.cat((z, *relaxed))).chunk(3)
        baseline, correction = eta * free, eta * (free - given)
    else:
        value = log_likelihood(z)
    if entropy == "sampled":
        value = value - _log_q(log_p, z)
    if estimator in ("score_function", "rebar"):
        value = score_function_surrogate(value, _log_q(log_p, z), _baseline(baseline, value)) + correction
    result = value.mean(0) + prior
    return result + categorical_entropy(logits).sum(-1) if entropy == "exact" else result


def _rebar_samples(log_p: Tensor, tau: float | Tensor, seed: Seed) -> tuple[Tensor, Tensor, Tensor]:
    r"""z = one_hot(argmax y) for y = log p + g, and two relaxed samples softmax(y / tau), equal in value::

        free     dy = dlog p                      as y varies with p for fixed noise
        given z  dy_j = (1 - e^{y_j - max y}) dlog p_j    as y given z varies with p, again for fixed noise:
                 max y is standard Gumbel whatever p is, and the others are
                 y_j = -log(e^{-max y} + e_j / p_j), e_j standard exponential

    The mean over the noise of each asks for its own distribution alone; that both have one noise correlates them best.
    """
    log_p = log_p.masked_fill(log_p == -math.inf, torch.finfo(log_p.dtype).min)
    noise = gumbel(*log_p.shape, seed=seed, dtype=log_p.dtype, device=log_p.device)
    y = log_p.detach() + noise
    top, index = y.max(-1, keepdim=True)
    change = log_p - log_p.detach()
    free, given = y + change, y - change * torch.expm1(y - top)
    z = torch.zeros_like(y).scatter_(-1, index, 1.0)
    return z, (free / tau).softmax(-1), (given / tau).softmax(-1)


def _baseline(baseline: Baseline, value: Tensor) -> Tensor | float:
    if baseline is None:
        return 0.0
    if isinstance(baseline, str):
        check_choice("baseline", baseline, ("leave_one_out",))
        return leave_one_out(value)
    return baseline(value) if callable(baseline) else baseline
