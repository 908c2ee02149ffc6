"""The maths of one token's softmax for Triton: the twin of csrc/common/softmax.h, with the same formulas.

y is the logit after the soft cap; z = scale * y with scale = 1 / temperature; u = y - max y <= 0, and e = e^(scale u). Sums run in
fp32 lanes, one per column of a tile: lane l adds the columns l, l + LANES, ... in that order. The order in which the lanes are
joined at the end follows from how threads hold them, and that from the width of the loads.

A row by itself takes the exponent as one rounding, d = scale2 y - offset in base 2, with `offset` the rounded scale2 max y and `rest`
what it lost: d = scale2 u + rest. Two rows that are compared (exact KL) take u, and v = u of the reference, so that gaps between
them keep their digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST = tl.constexpr(-3.4028234663852886e38)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp_of(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def log_of(x):
    """log x of a normal number > 0 to 1 ulp or so, where tl.log on a GPU is off by 2^-22 of the largest logarithm; NaN of NaN."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # x = 2^k m with m in [sqrt(1/2), sqrt(2))
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)
    z = (m - 1.0) / (m + 1.0)  # log m = 2 artanh z, |z| < 0.172
    q = z * z
    series = tl.fma(q, 1 / 9, 1 / 7)
    series = tl.fma(q, series, 1 / 5)
    series = tl.fma(q, series, 1 / 3)
    log_m = tl.fma(2.0 * z * q, series, 2.0 * z)
    k = k.to(tl.float32)
    found = tl.fma(
        k, 0.693145751953125, tl.fma(k, 1.428606765330187e-06, log_m)
    )  # ln 2 in two parts, k times the first exact
    return tl.where(x == x, found, x)


@triton.jit
def one_minus_exp(x):
    """1 - e^x for x <= 0 without cancellation near 0."""
    p = tl.fma(x, 0.0011259174, 0.0081932896)  # (e^x - 1 - x) / x^2, relative error of the whole 2e-9 on [-0.5, 0]
    p = tl.fma(x, p, 0.0416320463)
    p = tl.fma(x, p, 0.1666628873)
    p = tl.fma(x, p, 0.4999998647)
    return tl.where(x > -0.5, -tl.fma(x * x, p, x), 1.0 - exp_of(x))


@triton.jit
def tanh_of(x):
    q = x * x
    p = tl.fma(q, -0.0062741932, 0.0210716484)  # (tanh x / x - 1) / x^2, relative error of the whole 1e-9 below 0.55
    p = tl.fma(q, p, -0.0538523030)
    p = tl.fma(q, p, 0.1333258608)
    p = tl.fma(q, p, -0.3333331756)
    near = tl.fma(x * q, p, x)
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, near, far)


@triton.jit
def widened(x):
    """x in fp32. The upper half of a word is bf16 already: a mask on integers is one instruction where the conversion takes two."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def share_of(x, softcap):
    """x / softcap, rounded once or nearly so: the product with a reciprocal and what it is short of."""
    inverse = 1.0 / softcap
    y = x * inverse
    return tl.where(tl.abs(y) < float("inf"), tl.fma(tl.fma(-y, softcap, x), inverse, y), y)


@triton.jit
def capped(x, softcap, CAP: tl.constexpr):
    """softcap * tanh(x / softcap), or x."""
    if CAP:
        x = softcap * tanh_of(share_of(x, softcap))
    return x


@triton.jit
def slope_of(x, softcap, CAP: tl.constexpr):
    """The derivative of `capped`."""
    if CAP:
        t = tanh_of(share_of(x, softcap))
        return 1.0 - t * t
    else:
        return 1.0


@triton.jit
def scale_of(temperature):
    """1 / temperature, kept finite so that 0 * scale stays 0."""
    return tl.minimum(tl.div_rn(1.0, temperature), LARGEST)


@triton.jit
def base_of(top):
    """What to subtract from a logit: the maximum, or 0 while only -inf was seen (-inf - -inf would be NaN)."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def point_of(top, scale2):
    """(scale2, offset, rest) of exponents relative to the logit `top`.

    The offset is held below 2^30, which leaves 2^5 for `rest`: beyond it two neighbouring fp32 logits are 32 apart in base 2, and
    a smaller scale still gives all the weight to the largest.
    """
    base = base_of(top)
    exponent = tl.maximum((base.to(tl.int32, bitcast=True) >> 23) & 255, 29)  # |base| < 2^(exponent - 126)
    largest = ((283 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^(156 - exponent)
    scale2 = tl.minimum(scale2, largest)
    offset = base * scale2
    return scale2, offset, tl.fma(base, scale2, -offset)


@triton.jit
def raised(sums, weighted, top, rest, to, to_scale2, to_rest):
    """(sum e, sum e d) relative to the logit `to` above `top`. Before the first logit every term is 0 (or NaN)."""
    shift = tl.fma(top - to, to_scale2, to_rest - rest)
    shift = tl.where(top == float("-inf"), 0.0, tl.maximum(shift, -256.0))  # 2^-256 is 0, and times a sum no NaN
    factor = tl.exp2(shift)
    return factor * sums, factor * tl.fma(shift, sums, weighted)


@triton.jit
def add_terms(y, scale2, offset, sums, weighted):
    """(sum e, sum e d) with the tile y added."""
    d = tl.fma(y, scale2, -offset)
    e = tl.exp2(d)
    # -inf is lifted to a finite number, since 0 * -inf would be NaN; a NaN goes through e
    return sums + e, tl.fma(e, tl.maximum(d, LOWEST), weighted)


@triton.jit
def shift_of(top, to):
    """What raising the maximum to `to` adds to every earlier u (<= 0, finite)."""
    return tl.where(to > top, tl.where(top == float("-inf"), 0.0, tl.maximum(top - to, LOWEST)), 0.0)


@triton.jit
def raised_pair(sums, weighted, ref_sums, gap, shift, ref_shift, scale2):
    """(sum e, sum e u, the reference's sum e, sum e (u - v)) after u and v moved by their shifts."""
    factor = tl.exp2(shift * scale2)
    weighted = tl.where(factor == 0.0, 0.0, factor * tl.fma(shift, sums, weighted))  # a NaN lives on in the sum
    sums = factor * sums
    gap = tl.where(factor == 0.0, 0.0, tl.fma(shift, sums, factor * gap))  # an infinite gap of weight 0 is gone
    return sums, weighted, ref_sums * tl.exp2(ref_shift * scale2), tl.fma(-ref_shift, sums, gap)


@triton.jit
def add_pair(y, yr, base, ref_base, scale2, sums, weighted, ref_sums, gap):
    """The same sums with two tiles added, y of the policy and yr of the reference."""
    u, v = y - base, yr - ref_base
    e = tl.exp2(u * scale2)
    gap = tl.where(e == 0.0, gap, tl.fma(e, u - v, gap))  # -inf - -inf has no weight
    return sums + e, tl.fma(e, tl.maximum(u, LOWEST), weighted), ref_sums + tl.exp2(v * scale2), gap


@triton.jit
def finite_or_nan(x, top):
    """x; NaN for a row that holds NaN or +inf, or nothing but -inf, like log_softmax. `top` is its largest logit."""
    return tl.where(tl.abs(top) < float("inf"), x, float("nan"))


@triton.jit
def gradient_terms(g_logprob, g_entropy, g_logsumexp, g_kl, p_sum, log_p_sum, p_mean, log_ratio, q_mean, scale):
    """(constant, by_z, by_gap): d/dy_j = e_j (constant + by_z z_j + by_gap (z_j - z'_j)) away from the target, which is
    scale p_j (g_lse - g_logprob - g_entropy (log p_j + H) + g_kl (log p_j - log q_j - KL)), z and z' relative to the largest.

    p_mean is H, q_mean is KL, log_ratio is that of the sums of policy and reference. Terms nobody asked for are left out rather
    than multiplied by 0: an infinite KL must not turn them into NaN.
    """
    constant = g_logsumexp - g_logprob
    constant = tl.where(g_entropy != 0.0, constant - g_entropy * (p_mean - log_p_sum), constant)
    constant = tl.where(g_kl != 0.0, constant - g_kl * (q_mean + log_ratio), constant)
    norm = tl.div_rn(scale, p_sum)
    return constant * norm, -g_entropy * norm, g_kl * norm


@triton.jit
def target_gradient(g_logprob, g_entropy, g_logsumexp, g_kl, log_p_sum, p_mean, log_ratio, q_mean, u, v, scale):
    """The same at the target, where 1 - p is taken without cancellation: a confident policy has p within rounding of 1."""
    log_p = u * scale - log_p_sum
    log_p = tl.where(log_p > 0.0, 0.0, log_p)
    prob = exp_of(log_p)
    d = tl.where(g_logprob == 0.0, 0.0, g_logprob * one_minus_exp(log_p))
    more = d + prob * g_logsumexp
    more = tl.where(g_entropy != 0.0, more - prob * g_entropy * (log_p + p_mean), more)
    more = tl.where(g_kl != 0.0, more + prob * g_kl * ((u - v) * scale - log_ratio - q_mean), more)
    return scale * tl.where(prob == 0.0, d, more)
