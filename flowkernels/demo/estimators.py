"""Bias and variance of the gradient estimators, against the exact gradient of a space small enough to enumerate."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from flowkernels.demo.common import Options
from flowkernels.demo.report import pyplot, save_numbers, table
from flowkernels.objectives import elbo_discrete

TAUS = (2.0, 1.0, 0.5, 0.25, 0.1, 0.05)
LATENTS, CATEGORIES = 2, 3


@dataclass(frozen=True)
class Measured:
    """One estimator at one temperature (None where it has none), from n draws of the gradient."""

    estimator: str
    tau: float | None
    bias: float  # |mean - exact|
    error: float  # standard error of that distance, sqrt(variance / n)
    variance: float  # trace of the covariance of one draw


def problem() -> tuple[Tensor, Tensor]:
    """(logits (k, d), weights of the log-likelihood), float64, fixed."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(LATENTS, CATEGORIES, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, LATENTS * CATEGORIES, generator=generator, dtype=torch.float64)
    return logits, weights


def log_likelihood(z: Tensor, weights: Tensor) -> Tensor:
    """Not linear in z, so that what holds at the corners says little about what lies between."""
    return -(z.flatten(-2) @ weights.T - 1).square().sum(-1)


def gradients(estimator: str, tau: float | None, draws: int, seed: int) -> Tensor:
    """`draws` independent gradients of the ELBO by the logits, (draws, k d)."""
    logits, weights = problem()
    many = logits.expand(draws, -1, -1).clone().requires_grad_()
    options = {} if tau is None else {"tau": tau}
    baseline = None
    if estimator == "score_function_leave_one_out":
        estimator, baseline = "score_function", "leave_one_out"
        options = {"samples": 4}
    value = elbo_discrete(
        many,
        lambda z: log_likelihood(z, weights),
        estimator=estimator,
        baseline=baseline,
        seed=seed,
        **options,  # type: ignore[arg-type]
    )
    (grad,) = torch.autograd.grad(value.sum(), many)
    return grad.flatten(1)


def measure(estimator: str, tau: float | None, draws: int, seed: int = 0) -> Measured:
    exact = gradients("exact", None, 1, 0)[0]
    grads = gradients(estimator, tau, draws, seed)
    variance = float(grads.var(0).sum())
    return Measured(estimator, tau, float((grads.mean(0) - exact).norm()), (variance / draws) ** 0.5, variance)


def study(draws: int = 200_000, seed: int = 0) -> list[Measured]:
    """Every estimator, those with a temperature over `TAUS`."""
    results = []
    for estimator in ("gumbel", "gumbel_straight_through", "rebar"):
        results += [measure(estimator, tau, draws, seed) for tau in TAUS]
    for estimator in ("straight_through", "score_function", "score_function_leave_one_out"):
        results.append(measure(estimator, None, draws, seed))
    return results


def run(options: Options) -> None:
    """Prints the table, and draws bias and variance over tau into estimators.png."""
    results = study(5_000 if options.quick else 400_000, options.seed)
    head = ("estimator", "tau", "bias", "standard error", "variance")
    rows = [
        (r.estimator, "" if r.tau is None else f"{r.tau:g}", f"{r.bias:.4f}", f"{r.error:.4f}", f"{r.variance:.3f}")
        for r in results
    ]
    print("\nGradient of the ELBO against the exact one, by enumeration\n" + table(head, rows))

    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for i, name in enumerate(dict.fromkeys(r.estimator for r in results)):
        found = [r for r in results if r.estimator == name]
        if found[0].tau is None:  # a level line
            found, style = found * len(TAUS), f"C{i}--"
        else:
            style = f"C{i}o-"
        left.plot(TAUS, [r.bias for r in found], style)
        left.plot(TAUS, [3 * r.error for r in found], f"C{i}:", alpha=0.6)
        right.plot(TAUS, [r.variance for r in found], style, label=name)
    left.set_title("dotted: 3 standard errors; a bias below them is not seen", fontsize=9)
    for axes, what in ((left, "bias"), (right, "variance")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("tau")
        axes.set_ylabel(f"{what} of the gradient")
    figure.legend(loc="outside right center", fontsize=8)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "estimators.png", dpi=120)
    plt.close(figure)
    save_numbers(options.out / "estimators.json", {"study": "estimators", "results": [asdict(r) for r in results]})
    print(f"\n  picture  {options.out / 'estimators.png'}")
