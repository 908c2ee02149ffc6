"""The maths of one token with its derivative, on blocks of tokens: the Triton twin of csrc/common/elementary.h and token_losses.h.

Everything is plain fp32 arithmetic. Triton's own exp is a rounded multiply and an approximate ex2, 20 times the rounding error
of fp32 at the clamp of the log-ratio; the reduction below keeps one.
"""

import triton
import triton.language as tl

from rlhf_fast.surrogates import RATIO_CLAMP, SEQUENCE_CLAMP

K1, K2, K3, ABS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""KL estimators, in the order of rlhf_fast.reference.kl_estimate.KINDS."""

TOKEN, SEQUENCE, SEQUENCE_TOKEN, PRODUCT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
CLIP, CISPO, SCORE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Levels of the ratio and surrogates, in the order of rlhf_fast.reference.ppo_loss.LEVELS and SURROGATES."""

_RATIO_CLAMP, _SEQUENCE_CLAMP = tl.constexpr(RATIO_CLAMP), tl.constexpr(SEQUENCE_CLAMP)

_hex = lambda text: tl.constexpr(float.fromhex(text))

_MAGIC = _hex("0x1.8p23")
_LOG2E = _hex("0x1.715476p0")
_HALF_LN2_HIGH = _hex("0x1.63p-2")
_HALF_LN2_LOW = _hex("-0x1.bd0106p-14")
_Q4, _Q3, _Q2, _Q1 = map(_hex, ("0x1.6c6a48p-10", "0x1.120a1cp-7", "0x1.55557ap-5", "0x1.5554dep-3"))
_LARGEST = _hex("0x1.62e42ep6")
"""The largest x whose e^x is finite."""
_SMALLEST = tl.constexpr(-86.0)
"""Below this e^x is flushed to 0."""


@triton.jit
def _reduced_exp(x):
    """x = k ln 2 + r, |r| <= ln(2) / 2 (Cody-Waite), so that e^x = 2^k (1 + r + excess); with half of 2^k and half of k ln 2.

    Half of 2^k does not overflow at k = 128. The polynomial is (e^r - 1 - r) / r^2, minimax, relative error 1.3e-7.
    """
    shifted = x * _LOG2E + _MAGIC
    k = shifted - _MAGIC
    high = k * _HALF_LN2_HIGH  # exact
    low = k * _HALF_LN2_LOW
    r = (x - (high + high)) - (low + low)
    q = ((r * _Q4 + _Q3) * r + _Q2) * r + _Q1
    excess = (q * r + 0.5) * (r * r)
    half = ((shifted.to(tl.int32, bitcast=True) + 126) << 23).to(tl.float32, bitcast=True)
    return high, low, r, excess, half


@triton.jit
def exp_of(x):
    """e^x, at most 2 ulp off; results below 2^-124 are flushed to 0."""
    _, _, r, excess, half = _reduced_exp(x)
    y = (excess + r + 1.0) * half * 2.0
    return tl.where(x > _LARGEST, float("inf"), tl.where(x < _SMALLEST, 0.0, y))


@triton.jit
def k3_of(x):
    """e^x - 1 - x, which cancels near 0, as (2^k - 1 - k ln 2) + (2^k - 1) r + 2^k excess; relative error 3e-7."""
    high, low, r, excess, half = _reduced_exp(x)
    t = half - 0.5
    y = (((t - high) - low) + t * r + half * excess) * 2.0
    return tl.where(x > _LARGEST, float("inf"), tl.where(x < _SMALLEST, -1.0 - x, y))


@triton.jit
def log1p_of(x):
    """log(1 + x) for 0 <= x <= 1: x times a minimax polynomial; at most 2 ulp off."""
    q = x * 0.00523267397 - 0.02950516366
    q = q * x + 0.07822584363
    q = q * x - 0.1366323832
    q = q * x + 0.1910600443
    q = q * x - 0.2484298207
    q = q * x + 0.3331909688
    q = q * x - 0.4999949315
    q = q * x + 0.9999999699
    return q * x


@triton.jit
def clamp_of(x, low, high):
    """x in [low, high]; NaN passes through, infinite bounds bound nothing."""
    y = tl.where(x < low, low, x)
    return tl.where(y > high, high, y)


@triton.jit
def kl_token(logp, ref, clamp_in, clamp_out, KIND: tl.constexpr, THROUGH: tl.constexpr):
    """(estimate of KL(policy || reference), its derivative towards logp).

    Beyond a bound the value is the bound and the derivative 0; THROUGH (straight-through) takes the derivative of k2 without
    bounds. The derivative of k1 does not vanish at 0: mask it.
    """
    raw = ref - logp
    x = clamp_of(raw, -clamp_in, clamp_in)
    if KIND == K1:
        value = -x
        slope = tl.full(x.shape, 1.0, tl.float32)
    elif KIND == K2:
        value = x * x * 0.5
        slope = -x
    elif KIND == K3:
        value = k3_of(x)
        slope = -(value + x)  # 1 - e^x without cancellation
    else:
        value = tl.abs(x)
        slope = tl.where(x > 0, -1.0, tl.where(x < 0, 1.0, 0.0))
    bounded = clamp_of(value, -clamp_out, clamp_out)
    if THROUGH:
        slope = -raw
    else:
        slope = tl.where((tl.abs(raw) > clamp_in) | (tl.abs(value) > clamp_out), 0.0, slope)
    return bounded, slope


@triton.jit
def ratio_token(logp, old, ratio_clamp):
    """(log-ratio after the clamp, ratio, whether the clamp moved it)."""
    difference = logp - old
    log_ratio = clamp_of(difference, -ratio_clamp, ratio_clamp)
    return log_ratio, exp_of(log_ratio), (difference > log_ratio) | (difference < log_ratio)


@triton.jit
def row_ratio(total, length, LEVEL: tl.constexpr):
    """(ratio that all tokens of a row see, its logarithm's derivative towards the log-ratio of one of them: 0 beyond a bound).

    total: sum of the log-ratios of the `length` real tokens. Their mean is bounded from above (GSPO, arXiv 2507.18071), the
    logarithm of the product on both sides.
    """
    if LEVEL == PRODUCT:
        x, moves = total, 1.0
        bounded = clamp_of(x, -_RATIO_CLAMP, _RATIO_CLAMP)
    else:
        x, moves = tl.div_rn(total, length), tl.div_rn(1.0, length)
        bounded = tl.where(x > _SEQUENCE_CLAMP, _SEQUENCE_CLAMP, x)
    return exp_of(bounded), tl.where((x > bounded) | (x < bounded), 0.0, moves)


@triton.jit
def policy_token(ratio, clamped, advantage, low, high, dual_clip):
    """(loss, d loss / d logp, clipped, capped) of max(-A rho, -A clip(rho)), at most -c A where A < 0.

    arXiv 1707.06347 eq. 7, 1912.09729 eq. 5. low, high: bounds of the ratio; dual_clip: c, infinity for none.
    """
    plain = -advantage * ratio
    bounded = -advantage * clamp_of(ratio, low, high)
    clipped = bounded > plain
    larger = tl.where(clipped, bounded, plain)
    cap = dual_clip * tl.abs(advantage)  # where A >= 0 the loss is below 0; infinity times 0 is NaN and caps nothing
    capped = larger > cap
    loss = tl.where(capped, cap, larger)
    return loss, tl.where(clipped | capped | clamped, 0.0, plain), clipped, capped


@triton.jit
def weighted_token(logp, ratio, advantage, low, high):
    """(loss, d loss / d logp, clipped) of -w A logp: the ratio in its bounds is a weight without gradient (CISPO, arXiv 2506.13585)."""
    weight = clamp_of(ratio, low, high)
    slope = -weight * advantage
    return slope * logp, slope, weight != ratio


@triton.jit
def surrogate_token(logp, ratio, stopped, advantage, low, high, dual_clip, SURROGATE: tl.constexpr):
    """(loss, d loss / d logp, clipped, capped); stopped: where the ratio does not follow logp."""
    none = stopped & False
    if SURROGATE == CLIP:
        return policy_token(ratio, stopped, advantage, low, high, dual_clip)
    elif SURROGATE == CISPO:
        loss, slope, clipped = weighted_token(logp, ratio, advantage, low, high)
        return loss, slope, clipped, none
    else:
        return -advantage * logp, -advantage, none, none


@triton.jit
def row_slope(ratio, gains, losses, low, high, dual_clip):
    """Derivative of the sum of a row's `policy_token`s towards the logarithm of the ratio that they share.

    gains, losses: sums of the advantages that are not below 0, and of those that are. The derivative is linear in either.
    """
    one = tl.full((), 1.0, tl.float32)
    _, up, _, _ = policy_token(ratio, False, one, low, high, dual_clip)
    _, down, _, _ = policy_token(ratio, False, -one, low, high, dual_clip)
    return gains * up - losses * down


@triton.jit
def value_token(value, old, target, bound):
    """(loss, d loss / d value, clipped) of max((V - R)^2, (clip(V, old +- bound) - R)^2) / 2."""
    error = value - target
    other = clamp_of(value, old - bound, old + bound) - target
    clipped = other * other > error * error
    return tl.where(clipped, other * other, error * error) * 0.5, tl.where(clipped, 0.0, error), clipped
