"""What the Triton kernels share: elementary functions and scale laws, the formulas of csrc/common in Triton.

`libdevice` is not used: it does not exist when kernels run interpreted, which is how they are tested without a GPU.
Triton's own float32 `exp` is fast but loses bits for large arguments, and there is no log1p, expm1, tanh or atan: they
are built here. Every function keeps the type of its argument, float32 or float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Whether kernels run interpreted; decided when they are defined.
INTERPRETED: bool = triton.knobs.runtime.interpret

EXP, SOFTPLUS, SIGMOID, TANH, ATAN, SOFTCLIP, CLIP, UNIT = (tl.constexpr(i) for i in range(8))
SCALE_SHIFT, SHIFT_SCALE, GATE = (tl.constexpr(i) for i in range(3))


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def power_of_2(n):
    """2^n for an int32 n in the range of normal floats."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    # x = n ln 2 + r with |r| <= ln(2) / 2, where the fast exponential is accurate; 2^n in two factors
    # reaches the whole range.
    c = tl.minimum(tl.maximum(x, -104.0), 89.0)
    n = tl.floor(c * 1.4426950408889634 + 0.5)
    r = (c - n * 0.693145751953125) - n * 1.428606765330187e-06
    i = n.to(tl.int32)
    half = i >> 1
    y = tl.exp(r) * power_of_2(half) * power_of_2(i - half)
    y = tl.where(x > 88.7228317, float("inf"), y)
    return tl.where(x == x, y, x)


@triton.jit
def log1p(y):
    """log(1 + y) for y > -1: what is lost in 1 + y comes back as a factor."""
    w = 1.0 + y
    rest = w - 1.0
    safe = tl.where(rest == 0.0, 1.0, rest)
    return tl.where(rest == 0.0, y, tl.log(w) * (y / safe))


@triton.jit
def expm1(x):
    """e^x - 1 for moderate x: the error of e^x is taken out by its own logarithm."""
    u = exp(x)
    near = u == 1.0
    log_u = tl.log(tl.where(near, 2.0, u))
    return tl.where(near, x, (u - 1.0) * (x / log_u))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def positive(x):
    return tl.where(x < 0.0, 0.0, x)  # keeps a NaN


@triton.jit
def negative(x):
    return tl.where(x > 0.0, 0.0, x)


@triton.jit
def softplus(x):
    return positive(x) + log1p(exp(-tl.abs(x)))


@triton.jit
def log_sigmoid(x):
    return negative(x) - log1p(exp(-tl.abs(x)))


@triton.jit
def log_softplus(x):
    y = exp(-tl.abs(x))
    low = x < -80.0
    rest = log1p(y)
    z = tl.where(x < 0.0, rest / tl.where(low, 1.0, y), x + rest)
    r = negative(x) + tl.log(tl.where(low, 1.0, z))
    return tl.where(x < -40.0, x, r)


@triton.jit
def tanh(x):
    a = tl.minimum(2.0 * tl.abs(x), 60.0)
    d = expm1(a)
    y = d / (d + 2.0)
    y = tl.where(x < 0.0, -y, y)
    return tl.where(x == x, y, x)


@triton.jit
def atan(x):
    """Two halvings of the angle bring it under pi/16, where eleven terms of the series are exact to float64."""
    a = tl.abs(x)
    big = a > 1.0
    b = tl.where(big, 1.0 / a, a)
    b = b / (1.0 + tl.sqrt(1.0 + b * b))
    b = b / (1.0 + tl.sqrt(1.0 + b * b))
    z = b * b
    p = 1.0 / 21
    p = 1.0 / 19 - z * p
    p = 1.0 / 17 - z * p
    p = 1.0 / 15 - z * p
    p = 1.0 / 13 - z * p
    p = 1.0 / 11 - z * p
    p = 1.0 / 9 - z * p
    p = 1.0 / 7 - z * p
    p = 1.0 / 5 - z * p
    p = 1.0 / 3 - z * p
    y = 4.0 * (b - b * z * p)
    y = tl.where(big, 1.5707963267948966 - y, y)
    return tl.where(x < 0.0, -y, y)


@triton.jit
def scale_of(u, LAW: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """(sigma, log sigma) of csrc/common/scales.h."""
    if LAW == SOFTPLUS:
        v = u + A
        sigma = softplus(v) + B
        if B > 0.0:
            return sigma, tl.log(sigma)
        else:
            return sigma, log_softplus(v)
    elif LAW == SIGMOID:
        v = u + A
        sigma = sigmoid(v) + B
        if B > 0.0:
            return sigma, tl.log(sigma)
        else:
            return sigma, log_sigmoid(v)
    elif LAW == UNIT:
        return u * 0.0 + 1.0, u * 0.0
    else:
        if LAW == EXP:
            s = A * u
        elif LAW == TANH:
            s = A * tanh(u / A)
        elif LAW == ATAN:
            s = A * 0.636 * atan(u / A)
        elif LAW == SOFTCLIP:
            s = u / (1.0 + tl.abs(u) * C)
        else:
            s = tl.where(u < A, A, tl.where(u > B, B, u))
        return exp(s), s


@triton.jit
def slope_of(u, LAW: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """d log sigma / du."""
    if LAW == EXP:
        return u * 0.0 + A
    elif LAW == SOFTPLUS:
        v = u + A
        if B > 0.0:
            return sigmoid(v) / (softplus(v) + B)
        else:
            return exp(log_sigmoid(v) - log_softplus(v))
    elif LAW == SIGMOID:
        v = u + A
        if B > 0.0:
            return sigmoid(v) * sigmoid(-v) / (sigmoid(v) + B)
        else:
            return sigmoid(-v)
    elif LAW == TANH:
        t = tanh(u / A)
        return (1.0 - t) * (1.0 + t)
    elif LAW == ATAN:
        v = u / A
        return 0.636 / (1.0 + v * v)
    elif LAW == SOFTCLIP:
        d = 1.0 + tl.abs(u) * C
        return 1.0 / (d * d)
    elif LAW == CLIP:
        return tl.where((u < A) | (u > B), u * 0.0 + C, u * 0.0 + 1.0)
    else:
        return u * 0.0


@triton.jit
def affine(
    x, shift, u, LAW: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    FORM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """(y, log-det) of csrc/common/affine.h."""
    sigma, log_sigma = scale_of(u, LAW, A, B, C)
    complement = sigma
    if FORM == GATE:
        complement = sigmoid(-(u + A)) - B
    if INVERSE:
        if FORM == SCALE_SHIFT:
            y = (x - shift) / sigma
        elif FORM == SHIFT_SCALE:
            y = x / sigma - shift
        else:
            y = (x - complement * shift) / sigma
        return y, -log_sigma
    else:
        if FORM == SCALE_SHIFT:
            y = sigma * x + shift
        elif FORM == SHIFT_SCALE:
            y = (x + shift) * sigma
        else:
            y = sigma * x + complement * shift
        return y, log_sigma


@triton.jit
def affine_backward(
    grad_y, grad_logdet, x, shift, u, LAW: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    FORM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients of (x, shift, u)."""
    sigma, _ = scale_of(u, LAW, A, B, C)
    slope = slope_of(u, LAW, A, B, C)
    complement = sigma
    if FORM == GATE:
        complement = sigmoid(-(u + A)) - B
    # dy / dlog sigma is sigma w forward and -w backward, with w = x, x + t or x - t of the flow's x.
    if INVERSE:
        grad_x = grad_y / sigma
        if FORM == SCALE_SHIFT:
            w, grad_shift = (x - shift) / sigma, -grad_x
        elif FORM == SHIFT_SCALE:
            w, grad_shift = x / sigma, -grad_y
        else:
            w, grad_shift = (x - shift) / sigma, -grad_x * complement
        return grad_x, grad_shift, -(grad_y * w + grad_logdet) * slope
    else:
        grad_x = grad_y * sigma
        if FORM == SCALE_SHIFT:
            w, grad_shift = x, grad_y
        elif FORM == SHIFT_SCALE:
            w, grad_shift = x + shift, grad_x
        else:
            w, grad_shift = x - shift, grad_y * complement
        return grad_x, grad_shift, (grad_x * w + grad_logdet) * slope


@triton.jit
def activate(v, ACTIVATION: tl.constexpr):
    """The activations of csrc/common/activations.h, by number."""
    if ACTIVATION == 1:
        return positive(v)
    elif ACTIVATION == 2:
        return tanh(v)
    elif ACTIVATION == 3:
        return tl.where(v > 0.0, v, expm1(negative(v)))
    elif ACTIVATION == 4:
        return v * sigmoid(v)
    elif ACTIVATION == 5:
        return tl.where(v > 0.0, v, 0.01 * v)
    elif ACTIVATION == 6:
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == 7:
        return sigmoid(v)
    elif ACTIVATION == 8:
        return softplus(v)
    else:
        return v


@triton.jit
def slope_from_kept(a, ACTIVATION: tl.constexpr):
    """d activate / dv from a = activate(v); for silu (4) and gelu (6), which are not monotonic, a is v itself."""
    if ACTIVATION == 1:
        return tl.where(a > 0.0, a * 0.0 + 1.0, a * 0.0)
    elif ACTIVATION == 2:
        return (1.0 - a) * (1.0 + a)
    elif ACTIVATION == 3:
        return tl.where(a > 0.0, a * 0.0 + 1.0, a + 1.0)
    elif ACTIVATION == 4:
        s = sigmoid(a)
        return s * (1.0 + a * (1.0 - s))
    elif ACTIVATION == 5:
        return tl.where(a > 0.0, a * 0.0 + 1.0, a * 0.0 + 0.01)
    elif ACTIVATION == 6:
        cdf = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
        return cdf + a * 0.3989422804014327 * exp(-0.5 * a * a)
    elif ACTIVATION == 7:
        return a * (1.0 - a)
    elif ACTIVATION == 8:
        return -expm1(-a)
    else:
        return a * 0.0 + 1.0


# ---- random streams: csrc/common/philox.h ----------------------------------------------------------------------


@triton.jit
def philox(seed, stream, block):
    """The four words of each block (int64), as uint32."""
    low: tl.constexpr = 0xFFFFFFFF
    b = block.to(tl.uint64)
    zero = b * 0
    c0, c1 = b & low, (b >> 32) & low
    s = zero + stream.to(tl.uint64)
    c2, c3 = s & low, (s >> 32) & low
    k = zero + seed.to(tl.uint64)
    k0, k1 = (k & low).to(tl.uint32), ((k >> 32) & low).to(tl.uint32)
    c0, c1, c2, c3 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def gumbel_window(seed, stream, first, COMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Noise of the elements first .. first + BLOCK - 1 of each row; `first` (ROWS, 1) is a multiple of four.

    One block of the stream gives four neighbours, so none is calculated twice.
    """
    block = first // 4 + tl.arange(0, BLOCK // 4)[None, :]
    w0, w1, w2, w3 = philox(seed, stream, block)
    word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, BLOCK))
    v = (word.to(COMPUTE) + 0.5) * 2.3283064365386963e-10
    if tl.float32 == COMPUTE:
        v = tl.minimum(v, 0.99999994)
    return -tl.log(-log1p(-v))


@triton.jit
def store_logdet(total, logdet_in_ptr, logdet_ptr, rows, RUNNING: tl.constexpr, ROWS: tl.constexpr):
    """The log-dets of a program's ROWS rows: sums over the columns of `total`, and what they were before if RUNNING."""
    logdet = tl.sum(total, 1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if RUNNING:
        logdet += tl.load(logdet_in_ptr + row, mask=row < rows, other=0.0)
    tl.store(logdet_ptr + row, logdet, mask=row < rows)
