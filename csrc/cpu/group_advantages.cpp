// Advantages relative to a group, and their adjoint. Group ids are hashed into dense group numbers in order of
// appearance, and sums run over the samples in their order, in double. There are as many samples as sequences, so one
// thread is enough.
#include <math.h>
#include <string.h>

#include "ops.h"

namespace rlhf_fast {
namespace {

enum GroupKind { kGrpo, kDrGrpo, kRloo, kReinforcePlusPlus, kOpo, kRemax, kPassAtK };  // order of reference KINDS

constexpr double kWhitenEps = 1e-8;

struct Groups {
  const uint8_t* mask;
  int64_t n;
  int64_t count = 0;
  int64_t* of;        // (n,) group of each sample, -1 where masked
  double *a, *b, *c;  // (n,) sums of each group
  int64_t* first;     // (n,) first sample of each group

  explicit Groups(const GroupAdvantagesArgs& args) : mask(args.mask), n(args.n) {
    int64_t* table = args.scratch;  // group number + 1 of the id that hashes here; 0 = free
    of = table + args.slots;
    int64_t* keys = of + n;
    a = reinterpret_cast<double*>(keys + n);
    b = a + n;
    c = b + n;
    first = reinterpret_cast<int64_t*>(c + n);
    memset(table, 0, sizeof(int64_t) * args.slots);
    for (int64_t i = 0; i < n; ++i) {
      if (mask && !mask[i]) {
        of[i] = -1;
        continue;
      }
      const int64_t id = args.group_ids[i];
      uint64_t h = static_cast<uint64_t>(id) * 0x9e3779b97f4a7c15u;
      h = (h ^ (h >> 32)) & (args.slots - 1);
      while (table[h] && keys[table[h] - 1] != id) h = (h + 1) & (args.slots - 1);
      if (!table[h]) {
        keys[count] = id;
        first[count] = i;
        table[h] = ++count;
      }
      of[i] = table[h] - 1;
    }
  }

  // sums[group] = sum of f(sample).
  template <class F>
  void sum(double* sums, F f) const {
    for (int64_t g = 0; g < count; ++g) sums[g] = 0;
    for (int64_t i = 0; i < n; ++i)
      if (of[i] >= 0) sums[of[i]] += f(i);
  }

  template <class F>
  double sum_all(F f) const {
    double total = 0;
    for (int64_t i = 0; i < n; ++i)
      if (of[i] >= 0) total += f(i);
    return total;
  }

  // out = f(sample, its group), 0 where masked.
  template <class T, class F>
  void write(T* out, F f) const {
    for (int64_t i = 0; i < n; ++i) out[i] = of[i] >= 0 ? static_cast<T>(f(i, of[i])) : T(0);
  }
};

// Every kind is linear in the scores or a linear part divided by a spread, so forward and backward share the group
// sums.
template <class T>
void run(const GroupAdvantagesArgs& args) {
  const T* r = static_cast<const T*>(args.scores);
  const T* grad = static_cast<const T*>(args.grad);
  T* out = static_cast<T*>(args.out);
  const Groups groups(args);
  double *a = groups.a, *b = groups.b, *c = groups.c;
  // Around the first score of the group, so that equal scores are zeros and leave no rounding to be scaled up.
  const auto score = [&](int64_t i) {
    return static_cast<double>(r[i]) - static_cast<double>(r[groups.first[groups.of[i]]]);
  };
  const auto upstream = [&](int64_t i) { return static_cast<double>(grad[i]); };

  if (args.kind == kRemax) {
    const T* greedy = static_cast<const T*>(args.greedy);
    return groups.write(out,
                        [&](int64_t i, int64_t) { return grad ? upstream(i) : static_cast<double>(r[i]) - greedy[i]; });
  }
  if (args.kind == kOpo) {  // r - sum(w r) / sum(w)
    const auto weight = [&](int64_t i) { return static_cast<double>(args.lengths[i]); };
    groups.sum(a, weight);
    groups.sum(b, [&](int64_t i) { return grad ? upstream(i) : weight(i) * score(i); });
    return groups.write(out, [&](int64_t i, int64_t g) {
      if (!(a[g] > 0)) return 0.0;
      return grad ? upstream(i) - weight(i) * b[g] / a[g] : score(i) - b[g] / a[g];
    });
  }
  if (args.kind == kPassAtK) {
    int64_t* best = reinterpret_cast<int64_t*>(a);  // sample
    int64_t* second = reinterpret_cast<int64_t*>(b);
    for (int64_t g = 0; g < groups.count; ++g) best[g] = second[g] = -1;
    for (int64_t i = 0; i < args.n; ++i) {
      const int64_t g = groups.of[i];
      if (g < 0) continue;
      if (best[g] < 0 || r[i] > r[best[g]]) {
        second[g] = best[g];
        best[g] = i;
      } else if (second[g] < 0 || r[i] > r[second[g]]) {
        second[g] = i;
      }
    }
    return groups.write(out, [&](int64_t i, int64_t g) {
      if (second[g] < 0 || !(r[best[g]] > r[second[g]])) return 0.0;
      if (!grad) return i == best[g] ? score(i) - score(second[g]) : 0.0;
      return i == best[g] ? upstream(i) : (i == second[g] ? -upstream(best[g]) : 0.0);
    });
  }

  groups.sum(a, [](int64_t) { return 1.0; });  // a: size
  groups.sum(b, score);                        // b: mean
  for (int64_t g = 0; g < groups.count; ++g) b[g] /= a[g];
  const auto centred = [&](int64_t i) { return score(i) - b[groups.of[i]]; };

  if (args.kind == kDrGrpo || args.kind == kRloo) {
    const auto factor = [&](int64_t g) { return args.kind == kDrGrpo ? 1.0 : (a[g] > 1 ? a[g] / (a[g] - 1) : 0.0); };
    if (!grad) return groups.write(out, [&](int64_t i, int64_t g) { return factor(g) * centred(i); });
    groups.sum(c, upstream);
    return groups.write(out, [&](int64_t i, int64_t g) { return factor(g) * (upstream(i) - c[g] / a[g]); });
  }
  if (args.kind == kGrpo) {  // (r - mean) / (std + eps)
    groups.sum(c, [&](int64_t i) { return centred(i) * centred(i); });
    const auto divisor = [&](int64_t g) {
      const double d = a[g] - (args.unbiased ? 1 : 0);
      return d > 1 ? d : 1.0;
    };
    for (int64_t g = 0; g < groups.count; ++g) c[g] = sqrt(c[g] / divisor(g));  // c: std
    if (!grad) {
      return groups.write(out, [&](int64_t i, int64_t g) { return c[g] == 0 ? 0.0 : centred(i) / (c[g] + args.eps); });
    }
    // dr_i = (g_i - mean g) / (std + eps) - (r_i - mean) sum(g (r - mean)) / (divisor std (std + eps)^2)
    int64_t* free_memory = args.scratch;  // the hash table is not needed any more, and holds two sums a group
    double *mean = reinterpret_cast<double*>(free_memory), *dot = mean + groups.count;
    groups.sum(mean, upstream);
    groups.sum(dot, [&](int64_t i) { return upstream(i) * centred(i); });
    return groups.write(out, [&](int64_t i, int64_t g) {
      if (c[g] == 0) return 0.0;
      const double s = c[g] + args.eps;
      return (upstream(i) - mean[g] / a[g]) / s - centred(i) * dot[g] / (divisor(g) * c[g] * s * s);
    });
  }
  // reinforce++: y = x s with x = r - group mean, whose batch mean is 0, and s = 1 / sqrt(var + eps) over the batch.
  double size = 0;
  for (int64_t g = 0; g < groups.count; ++g) size += a[g];
  const double divisor = size > 1 ? size - 1 : 1;
  const double s = 1 / sqrt(groups.sum_all([&](int64_t i) { return centred(i) * centred(i); }) / divisor + kWhitenEps);
  if (!grad) return groups.write(out, [&](int64_t i, int64_t) { return centred(i) * s; });
  const double slope = s * s * s * groups.sum_all([&](int64_t i) { return upstream(i) * centred(i); }) / divisor;
  const auto into_centred = [&](int64_t i) { return s * upstream(i) - slope * centred(i); };
  groups.sum(c, into_centred);
  groups.write(out, [&](int64_t i, int64_t g) { return into_centred(i) - c[g] / a[g]; });
}

}  // namespace

namespace RLHF_FAST_ISA {

int64_t group_advantages(const GroupAdvantagesArgs& a) {
  a.f64 ? run<double>(a) : run<float>(a);
  return -1;
}

}  // namespace RLHF_FAST_ISA
}  // namespace rlhf_fast
