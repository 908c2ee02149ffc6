"""The maths of one token's softmax for Triton: the twin of csrc/common/softmax.h, with the same formulas.

y is the logit after the soft cap; z = scale * y with scale = 1 / temperature; u = y - max y <= 0, and e = e^(scale u). Sums run in
fp32 lanes, one per column of a tile: lane l adds the columns l, l + LANES, ... in that order, and `total` joins the lanes in
one order whatever threads hold them. A row therefore has the same bits for any alignment of its address.

The weighted sums are of e u and e (u - v), v the u of the reference: the scale is left to the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def exp_of(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def log_of(x):
    """log x of a normal number > 0 to 1 ulp or so, where tl.log on a GPU is off by 2^-22 of the largest logarithm; NaN of NaN."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # x = 2^k m with m in [sqrt(1/2), sqrt(2))
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)
    z = tl.div_rn(m - 1.0, m + 1.0)  # log m = 2 artanh z, |z| < 0.172
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
def capped(x, softcap, CAP: tl.constexpr):
    """softcap * tanh(x / softcap), or x."""
    if CAP:
        x = softcap * tanh_of(x * tl.div_rn(1.0, softcap))
    return x


@triton.jit
def slope_of(x, softcap, CAP: tl.constexpr):
    """The derivative of `capped`."""
    if CAP:
        t = tanh_of(x * tl.div_rn(1.0, softcap))
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
def shift_of(top, to):
    """What raising the maximum to `to` adds to every earlier u (<= 0, finite)."""
    return tl.where(top == float("-inf"), 0.0, tl.maximum(top - to, LOWEST))  # before the first maximum every term is 0


@triton.jit
def raised(sums, weighted, shift, scale2):
    """(sum e, sum e u) after u moved by `shift`; scale2 = scale log2(e)."""
    factor = tl.exp2(shift * scale2)
    moved = tl.where(factor == 0.0, 0.0, factor * tl.fma(shift, sums, weighted))  # a NaN lives on in the sum
    return factor * sums, moved


@triton.jit
def raised_gap(gap, sums, shift, ref_shift, scale2):
    """sum e (u - v) after both moved; `sums` is sum e after its shift."""
    factor = tl.exp2(shift * scale2)
    gap = tl.where(factor == 0.0, 0.0, tl.fma(shift, sums, factor * gap))  # an infinite gap of weight 0 is gone
    return tl.fma(-ref_shift, sums, gap)


@triton.jit
def add_terms(y, base, scale2, sums, weighted):
    """(e, u, sum e, sum e u) with the tile y added."""
    u = y - base
    e = tl.exp2(u * scale2)
    # -inf is lifted to a finite number, since 0 * -inf would be NaN; a NaN goes through e
    return e, u, sums + e, tl.fma(e, tl.maximum(u, LOWEST), weighted)


@triton.jit
def add_gap(e, u, y, base, scale2, sums, gap):
    """(sum e, sum e_policy (u - v)) with the reference's tile y added; e, u of the policy."""
    v = y - base
    gap = tl.where(e == 0.0, gap, tl.fma(e, u - v, gap))  # -inf - -inf has no weight
    return sums + tl.exp2(v * scale2), gap


@triton.jit
def total(x, LANES: tl.constexpr):
    """The sum of LANES lanes as a tree of neighbours: sums of two commute, so no layout of the lanes over threads shows."""
    if LANES == 1:
        return tl.sum(x, 0)
    else:
        return total(tl.sum(tl.reshape(x, [LANES // 2, 2]), 1), LANES // 2)


@triton.jit
def log_sum_of(top, sums):
    """log sum e; NaN for a row that holds NaN or +inf, or nothing but -inf, like log_softmax."""
    return tl.where(tl.abs(top) < float("inf"), log_of(sums), float("nan"))


@triton.jit
def gradient_terms(g_logprob, g_entropy, g_logsumexp, g_kl, p_sum, log_p_sum, p_mean, log_q_sum, q_mean, scale):
    """(constant, by_u, by_gap): d/dy_j = e_j (constant + by_u u_j + by_gap (u_j - v_j)) away from the target, which is
    scale p_j (g_lse - g_logprob - g_entropy (log p_j + H) + g_kl (log p_j - log q_j - KL)).

    p_mean is H and q_mean is KL. Terms nobody asked for are left out rather than multiplied by 0: an infinite KL must not turn
    them into NaN.
    """
    constant = g_logsumexp - g_logprob
    constant = tl.where(g_entropy != 0.0, constant - g_entropy * (p_mean - log_p_sum), constant)
    constant = tl.where(g_kl != 0.0, constant - g_kl * (q_mean + log_p_sum - log_q_sum), constant)
    norm = tl.div_rn(scale, p_sum)
    return constant * norm, -g_entropy * scale * norm, g_kl * scale * norm


@triton.jit
def target_gradient(g_logprob, g_entropy, g_logsumexp, g_kl, log_p_sum, p_mean, log_q_sum, q_mean, u, v, scale):
    """The same at the target, where 1 - p is taken without cancellation: a confident policy has p within rounding of 1."""
    log_p = u * scale - log_p_sum
    log_p = tl.where(log_p > 0.0, 0.0, log_p)
    prob = exp_of(log_p)
    d = tl.where(g_logprob == 0.0, 0.0, g_logprob * one_minus_exp(log_p))
    more = d + prob * g_logsumexp
    more = tl.where(g_entropy != 0.0, more - prob * g_entropy * (log_p + p_mean), more)
    more = tl.where(g_kl != 0.0, more + prob * g_kl * (log_p - (v * scale - log_q_sum) - q_mean), more)
    return scale * tl.where(prob == 0.0, d, more)
