"""Monotonic rational splines in Triton: csrc/common/rq_spline.h and csrc/common/spline_bin.h, one element per lane.

The parameters of an element are read where they lie: `row` points at each lane's first one, the next is `step` further.
Bins are loops that read them again, in the caches by then, and select what belongs to the bin of the element: no
register is indexed, and none holds a parameter. `live` says which lanes have an element. Everything is calculated in
the type of x; `OPTIONS` comes from `options_of`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from flowkernels._triton import exp, positive, sigmoid, softplus
from flowkernels.transforms import _CODES

NFLOWS, ZUKO, PYRO, LINEAR = (tl.constexpr(_CODES.index(name)) for name in ("nflows", "zuko", "pyro", "linear"))

BOUND, MIN_WIDTH, MIN_HEIGHT, SLOPE, LOGIT, END, MIN_LAMBDA, BINS = (tl.constexpr(i) for i in range(8))


def options_of(style: int, numbers: Sequence[float], bins: int) -> tuple[float | int, ...]:
    """What the kernels know of a spline, in the order of the indices above (csrc/common/rq_spline.h: SplineOptions)."""
    bound, min_width, min_height, slope, last = numbers
    own_ends = style in (PYRO.value, LINEAR.value)
    return (
        bound, min_width, min_height, slope, 1.0 if own_ends else last, 1.0 - slope if own_ends else 1.0, last, bins
    )  # fmt: skip


# Of a lane, at most: without a bound of its own ptxas stops at the next step of occupancy and spills the rest.
REGISTERS = {"maxnreg": 255}

# What tests/gpu compiles: name, style, numbers, and parameters of a feature with 8 bins.
COMPILED = (
    ("nflows", 0, (3.0, 1e-3, 1e-3, 1e-3, 0.5), 23),
    ("zuko", 1, (5.0, 0.0, 0.0, 0.1, 0.3), 23),
    ("linear", 3, (3.0, 1e-3, 1e-3, 1e-3, 0.025), 31),
)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


@triton.jit
def quotient(a, b):
    """a / b rounded once: Triton's float32 division is not, and positions in a narrow bin show it."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(a):
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def unit(x):
    """x brought into [0, 1]."""
    return tl.where(x < 0.0, 0.0, tl.where(x > 1.0, 1.0, x))  # keeps a NaN


@triton.jit
def add_exactly(total, rest, value):
    """(total, rest) with `value` added: their sum stays that of all values to about twice the precision (csrc/common/
    sums.h)."""
    now = total + value
    added = now - total
    return now, rest + ((total - (now - added)) + (value - added))


# ---- parameters ----------------------------------------------------------------------------------------------------


@triton.jit
def parameter(row, step, k, live, like):
    return tl.load(row + tl.cast(k, tl.int64) * step, mask=live, other=0.0).to(like.dtype)


@triton.jit
def logit(u, STYLE: tl.constexpr, OPTIONS: tl.constexpr):
    if STYLE == ZUKO:
        return quotient(u, 1.0 + tl.abs(u) * OPTIONS[LOGIT])
    else:
        return u * OPTIONS[LOGIT]


@triton.jit
def logit_rate(u, STYLE: tl.constexpr, OPTIONS: tl.constexpr):
    """d logit / du"""
    if STYLE == ZUKO:
        d = 1.0 + tl.abs(u) * OPTIONS[LOGIT]
        return quotient(1.0, d * d)
    else:
        return OPTIONS[LOGIT]


@triton.jit
def slope_at_knot(u, STYLE: tl.constexpr, OPTIONS: tl.constexpr):
    if STYLE == ZUKO:
        return exp(quotient(u, 1.0 + tl.abs(u) * OPTIONS[SLOPE]))
    else:
        return OPTIONS[SLOPE] + softplus(u)


@triton.jit
def slope_rate(u, slope, STYLE: tl.constexpr, OPTIONS: tl.constexpr):
    """d slope / du; `slope` is slope_at_knot(u)."""
    if STYLE == ZUKO:
        d = 1.0 + tl.abs(u) * OPTIONS[SLOPE]
        return quotient(slope, d * d)
    else:
        return sigmoid(u)


# ---- bins ----------------------------------------------------------------------------------------------------------


@triton.jit
def shares(row, step, live, like, LEAST: tl.constexpr, STYLE: tl.constexpr, OPTIONS: tl.constexpr):
    """(largest, factor, rest): bin k takes the fraction LEAST + (factor + rest) exp(logit_k - largest)."""
    # zuko's logits stay below |log slope| / 2.
    largest = tl.zeros_like(like)
    if STYLE != ZUKO:
        largest = logit(parameter(row, step, 0, live, like), STYLE, OPTIONS)
        for k in range(1, OPTIONS[BINS]):
            largest = tl.maximum(largest, logit(parameter(row, step, k, live, like), STYLE, OPTIONS))
    total, rest = tl.zeros_like(like), tl.zeros_like(like)
    for k in range(OPTIONS[BINS]):
        e = exp(logit(parameter(row, step, k, live, like), STYLE, OPTIONS) - largest)
        total, rest = add_exactly(total, rest, e)
    whole = total + rest
    below = (total - whole) + rest
    part: tl.constexpr = 1.0 - OPTIONS[BINS] * LEAST
    factor = quotient(part, whole)
    # The one error that all knots share: where bins are narrow it would be the largest.
    return largest, factor, quotient((part - factor * whole) - factor * below, whole)


@triton.jit
def find(
    row, step, live, position, bin, largest, factor, factor_rest,
    SEARCH: tl.constexpr, LEAST: tl.constexpr, STYLE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """(bin, start, rest, size) of the bin that starts at start + rest in [-1/2, 1/2]: with SEARCH the one that
    `position` lies in, otherwise number `bin`."""
    start, size, rest = tl.zeros_like(position), tl.zeros_like(position) + 1.0, tl.zeros_like(position)
    knot, knot_rest = tl.zeros_like(position) - 0.5, tl.zeros_like(position)
    for k in range(OPTIONS[BINS]):
        e = exp(logit(parameter(row, step, k, live, position), STYLE, OPTIONS) - largest)
        # The last bin ends at 1/2 exactly, whatever the sum was rounded to.
        now = tl.where(k == OPTIONS[BINS] - 1, (0.5 - knot) - knot_rest, LEAST + factor * e)
        if SEARCH:
            here = position >= knot
            bin = tl.where(here, k, bin)
        else:
            here = bin == k
        start, rest, size = tl.where(here, knot, start), tl.where(here, knot_rest, rest), tl.where(here, now, size)
        knot, knot_rest = add_exactly(knot, knot_rest, now)
        knot_rest += factor_rest * e
    return bin, start, rest, size


@triton.jit
def is_inside(x, OPTIONS: tl.constexpr):
    bound = tl.zeros_like(x) + OPTIONS[BOUND]  # a number that is compared would be rounded to float32
    return (x >= -bound) & (x <= bound)


@triton.jit
def locate(x, row, step, live, INVERSE: tl.constexpr, STYLE: tl.constexpr, OPTIONS: tl.constexpr):
    """Everything about the bin of x, and theta, solved for when INVERSE. Lanes outside the bounds are put in the
    middle, so that what follows is finite."""
    heights, slopes = row + tl.cast(step, tl.int64) * OPTIONS[BINS], row + tl.cast(step, tl.int64) * (2 * OPTIONS[BINS])
    shares_x = shares(row, step, live, x, OPTIONS[MIN_WIDTH], STYLE, OPTIONS)
    shares_y = shares(heights, step, live, x, OPTIONS[MIN_HEIGHT], STYLE, OPTIONS)
    # position + rest = x / (2 bound), both parts: a small bin would show the rounding of the quotient.
    length = tl.zeros_like(x) + 2.0 * OPTIONS[BOUND]
    inside = tl.where(is_inside(x, OPTIONS), x, 0.0)
    position = quotient(inside, length)
    rest = quotient(inside - position * length, length)
    bin = tl.zeros_like(x).to(tl.int32)
    if INVERSE:
        bin, y0, y0_rest, height = find(
            heights, step, live, position, bin, *shares_y, True, OPTIONS[MIN_HEIGHT], STYLE, OPTIONS
        )
        bin, x0, x0_rest, width = find(
            row, step, live, position, bin, *shares_x, False, OPTIONS[MIN_WIDTH], STYLE, OPTIONS
        )
    else:
        bin, x0, x0_rest, width = find(
            row, step, live, position, bin, *shares_x, True, OPTIONS[MIN_WIDTH], STYLE, OPTIONS
        )
        bin, y0, y0_rest, height = find(
            heights, step, live, position, bin, *shares_y, False, OPTIONS[MIN_HEIGHT], STYLE, OPTIONS
        )
    first, last = bin == 0, bin == OPTIONS[BINS] - 1
    raw0 = parameter(slopes, step, bin - 1, live & ~first, x)
    raw1 = parameter(slopes, step, bin, live & ~last, x)
    d0 = tl.where(first, OPTIONS[END], slope_at_knot(raw0, STYLE, OPTIONS))
    d1 = tl.where(last, OPTIONS[END], slope_at_knot(raw1, STYLE, OPTIONS))
    raw_lambda, lam = tl.zeros_like(x), tl.zeros_like(x)
    if STYLE == LINEAR:
        raw_lambda = parameter(slopes, step, OPTIONS[BINS] - 1 + bin, live, x)
        lam = OPTIONS[MIN_LAMBDA] + (1.0 - 2.0 * OPTIONS[MIN_LAMBDA]) * sigmoid(raw_lambda)
    s = quotient(height, width)
    if INVERSE:
        eta = unit(quotient((position - y0) + (rest - y0_rest), height))
        theta = theta_of(eta, s, d0, d1, lam, STYLE)
    else:
        theta = quotient((position - x0) + (rest - x0_rest), width)
    return (
        unit(theta), bin, (x0, x0_rest, width), (y0, y0_rest, height), (s, d0, d1, lam), (raw0, raw1, raw_lambda),
        shares_x, shares_y,
    )  # fmt: skip


# ---- inside a bin: csrc/common/spline_bin.h, where the formulas stand ------------------------------------------------


@triton.jit
def piece(left, d0, d1, lam):
    """(l, g, k, q) of the linear-rational piece on one side of lambda: g is the root of the slope at its own knot."""
    g0, g1 = root(d0), root(d1)
    part, g, k = tl.where(left, lam, 1.0 - lam), tl.where(left, g0, g1), tl.where(left, g1, g0)
    return part, g, k, part * g + (1.0 - part) * k


@triton.jit
def theta_of(eta, s, d0, d1, lam, STYLE: tl.constexpr):
    if STYLE == LINEAR:
        g0, g1 = root(d0), root(d1)
        left = eta * (lam * g0 + (1.0 - lam) * g1) <= lam * g0
        part, g, _, q = piece(left, d0, d1, lam)
        e = tl.where(left, eta, 1.0 - eta)
        p = quotient(e * s * part, e * s + g * positive(part * g - e * q))
        return tl.where(left, p, 1.0 - p)
    else:
        m = d0 * (1.0 - eta) - d1 * eta
        c = m + 2.0 * s * eta
        both = tl.abs(c) + root(m * m + 4.0 * (s * eta) * (s * (1.0 - eta)))
        up = c >= 0.0
        return quotient(tl.where(up, 2.0 * s * eta, both), tl.where(up, both, 2.0 * (s + tl.abs(c))))


@triton.jit
def value(theta, s, d0, d1, lam, STYLE: tl.constexpr):
    """(eta, dy/dx)"""
    if STYLE == LINEAR:
        left = theta <= lam
        part, g, _, q = piece(left, d0, d1, lam)
        p = tl.where(left, theta, 1.0 - theta)
        inv = quotient(1.0, s * (part - p) + g * q * p)
        e, r = part * g * g * p * inv, s * (part * g * inv)
        return tl.where(left, e, 1.0 - e), r * r
    else:
        rest = 1.0 - theta
        t = theta * rest
        denominator = s + (d0 + d1 - 2.0 * s) * t
        n = d1 * theta * theta + 2.0 * s * t + d0 * rest * rest
        eta, slope = quotient(s * theta * theta + d0 * t, denominator), quotient(n, denominator)
        return eta, slope * s * quotient(s, denominator)


@triton.jit
def rates(theta, s, d0, d1, lam, STYLE: tl.constexpr):
    """eta and dy/dx, then the derivatives of eta by s, d0, d1, lambda, and those of log dy/dx by theta, s, d0, d1,
    lambda."""
    if STYLE == LINEAR:
        left = theta <= lam
        part, g, k, q = piece(left, d0, d1, lam)
        p = tl.where(left, theta, 1.0 - theta)
        gap = s * (part - p)
        inv = quotient(1.0, gap + g * q * p)
        e, r = part * g * g * p * inv, s * (part * g * inv)
        sign = tl.where(left, 1.0, -1.0)
        near, far = quotient(0.5, g * g), quotient(0.5, k)  # dg/dd over g, dk/dd
        other = g * p * (1.0 - part) * inv  # -dlog(denominator)/dk
        eta_near = sign * e * (2.0 * gap + g * k * p * (1.0 - part)) * inv * near
        eta_far = -sign * e * other * far
        log_near, log_far = 2.0 * (gap - g * g * part * p) * inv * near, -2.0 * other * far
        return (
            tl.where(left, e, 1.0 - e), r * r,
            -sign * e * (part - p) * inv, tl.where(left, eta_near, eta_far), tl.where(left, eta_far, eta_near),
            g * g * (p * inv) * (p * inv) * (g * k - s),
            -2.0 * sign * (g * q - s) * inv, quotient(2.0 * g * q * p * inv, s),
            tl.where(left, log_near, log_far), tl.where(left, log_far, log_near),
            quotient(2.0 * sign * p * (g * k - s) * inv, part),
        )  # fmt: skip
    else:
        rest, turn = 1.0 - theta, 1.0 - 2.0 * theta
        t = theta * rest
        bend = d0 + d1 - 2.0 * s
        inv = quotient(1.0, s + bend * t)
        n = d1 * theta * theta + 2.0 * s * t + d0 * rest * rest
        inv_n = quotient(1.0, n)
        eta = (s * theta * theta + d0 * t) * inv
        zero = tl.zeros_like(theta)
        return (
            eta, s * (n * inv) * (s * inv),
            (theta * theta - eta * (1.0 - 2.0 * t)) * inv, t * (1.0 - eta) * inv, -eta * t * inv, zero,
            2.0 * (d1 * theta + s * turn - d0 * rest) * inv_n - 2.0 * bend * turn * inv,
            quotient(2.0, s) + 2.0 * t * inv_n - 2.0 * (1.0 - 2.0 * t) * inv,
            rest * rest * inv_n - 2.0 * t * inv, theta * theta * inv_n - 2.0 * t * inv, zero,
        )  # fmt: skip


# ---- elements ------------------------------------------------------------------------------------------------------


@triton.jit
def spline(x, row, step, live, INVERSE: tl.constexpr, STYLE: tl.constexpr, OPTIONS: tl.constexpr):
    """(y, log-det) of every element."""
    theta, _, bin_x, bin_y, shape, _, _, _ = locate(x, row, step, live, INVERSE, STYLE, OPTIONS)
    eta, slope = value(theta, *shape, STYLE)
    if INVERSE:
        start, rest, size = bin_x
        at, logdet = start + (rest + size * theta), -tl.log(slope)
    else:
        start, rest, size = bin_y
        at, logdet = start + (rest + size * eta), tl.log(slope)
    inside = is_inside(x, OPTIONS)
    return tl.where(inside, 2.0 * OPTIONS[BOUND] * at, x), tl.where(inside, logdet, 0.0)


@triton.jit
def store_logit_gradients(
    row, step, grad_row, grad_step, live, bin, start, rest, size, largest, factor, _, before, own,
    LEAST: tl.constexpr, STYLE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Every fraction before the bin gets the gradient `before`, the bin's own gets `own`."""
    # With f_j = LEAST + factor e_j, sum over j of g_j (f_j - LEAST) needs only the fractions up to the bin, which are
    # known.
    scale: tl.constexpr = 1.0 / (1.0 - OPTIONS[BINS] * LEAST)
    fractions = (start + 0.5) + rest
    mean = (before * (fractions - bin.to(start.dtype) * LEAST) + own * (size - LEAST)) * scale
    for k in range(OPTIONS[BINS]):
        u = parameter(row, step, k, live, start)
        e = exp(logit(u, STYLE, OPTIONS) - largest)
        g = tl.where(bin > k, before, tl.where(bin == k, own, 0.0))
        gradient = factor * e * (g - mean) * logit_rate(u, STYLE, OPTIONS)
        tl.store(grad_row + tl.cast(k, tl.int64) * grad_step, gradient.to(grad_row.dtype.element_ty), mask=live)


@triton.jit
def spline_backward(
    grad_y, grad_logdet, x, row, step, grad_row, grad_step, live,
    INVERSE: tl.constexpr, STYLE: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """The gradient of x; those of the parameters are stored, the first at `grad_row`.

    For the inverse, x stands for its input, the flow's y: with f the forward transform at fixed parameters and l its
    log slope, dx = (dy - df) / f' and d(-l) = -(l_x dx + dl), so the forward derivatives serve with other cotangents.
    """
    theta, bin, bin_x, bin_y, shape, raw, shares_x, shares_y = locate(x, row, step, live, INVERSE, STYLE, OPTIONS)
    s, d0, d1, _ = shape
    raw0, raw1, raw_lambda = raw
    width, height = bin_x[2], bin_y[2]
    eta, slope, eta_s, eta_0, eta_1, eta_lambda, log_theta, log_s, log_0, log_1, log_lambda = rates(
        theta, *shape, STYLE
    )
    length = tl.zeros_like(x) + 2.0 * OPTIONS[BOUND]
    inside = is_inside(x, OPTIONS)
    gy, gl = tl.where(inside, grad_y * length, 0.0), tl.where(inside, grad_logdet, 0.0)
    if INVERSE:
        gu = quotient(gy - quotient(gl * log_theta, width), slope)
        per_width = -gy  # what the line of the forward direction comes to, without its cancellation
        gy, gl = -gu, -gl
    else:
        gu = gy * slope + quotient(gl * log_theta, width)
        per_width = gu
    grad_x = tl.where(inside, quotient(gu, length), grad_y)
    gr = gy * height
    stretch = quotient(gr * eta_s + gl * log_s, width)
    # The last bin ends at the bound, so its start alone moves: a softmax does not mind if its own share is taken off
    # all gradients, and they do not cancel later.
    last = bin == OPTIONS[BINS] - 1
    before_x = tl.where(last, stretch * s - per_width * (1.0 - theta), -per_width)
    own_x = tl.where(last, 0.0, -per_width * theta - stretch * s)
    before_y = tl.where(last, gy * (1.0 - eta) - stretch, gy)
    own_y = tl.where(last, 0.0, gy * eta + stretch)

    store_logit_gradients(
        row, step, grad_row, grad_step, live, bin, *bin_x, *shares_x, before_x, own_x,
        OPTIONS[MIN_WIDTH], STYLE, OPTIONS,
    )  # fmt: skip
    store_logit_gradients(
        row + tl.cast(step, tl.int64) * OPTIONS[BINS], step, grad_row + tl.cast(grad_step, tl.int64) * OPTIONS[BINS],
        grad_step, live, bin, *bin_y, *shares_y, before_y, own_y, OPTIONS[MIN_HEIGHT], STYLE, OPTIONS,
    )  # fmt: skip
    grad0 = (gr * eta_0 + gl * log_0) * slope_rate(raw0, d0, STYLE, OPTIONS)
    grad1 = (gr * eta_1 + gl * log_1) * slope_rate(raw1, d1, STYLE, OPTIONS)
    to = grad_row + tl.cast(grad_step, tl.int64) * (2 * OPTIONS[BINS])
    for k in range(OPTIONS[BINS] - 1):
        gradient = tl.where(bin == k + 1, grad0, tl.where(bin == k, grad1, 0.0))
        tl.store(to + tl.cast(k, tl.int64) * grad_step, gradient.to(grad_row.dtype.element_ty), mask=live)
    if STYLE == LINEAR:
        of_lambda = sigmoid(raw_lambda) * sigmoid(-raw_lambda) * (1.0 - 2.0 * OPTIONS[MIN_LAMBDA])
        grad_lambda = (gr * eta_lambda + gl * log_lambda) * of_lambda
        for k in range(OPTIONS[BINS]):
            gradient = tl.where(bin == k, grad_lambda, 0.0)
            at = tl.cast(OPTIONS[BINS] - 1 + k, tl.int64) * grad_step
            tl.store(to + at, gradient.to(grad_row.dtype.element_ty), mask=live)
    return grad_x
