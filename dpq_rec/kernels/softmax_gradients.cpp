// The backward pass of a choice by softmax (DPQ-SX). Its plain twin is softmax_gradients in tests/references.py.
//
// Scores and weights exist for one query and subspace at a time, in the first-level cache, rather than as N x D x K
// numbers in memory: those, not the arithmetic, set the time of a step.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "arrays.h"
#include "simd.h"

namespace nb = nanobind;
using dpq::Lanes;

namespace {

struct Args {
  const float* queries;    // [N, D, X]
  const float* keys;       // [D, X, P]: transposed, the codes padded to P, a multiple of kMaxLanes
  const float* values;     // [D, S, P]
  const float* scale;      // [P]
  const float* shift;      // [P]: -inf for the padding, so that it weighs nothing
  const float* gradients;  // [N, D, S], of the mixture
  float* query_gradients;  // [N, D, X], zeros before
  float* key_gradients;    // [D, X, P], zeros before
  float* value_gradients;  // [D, S, P], zeros before
  float* scale_gradients;  // [P], zeros before
  float* shift_gradients;  // [P], zeros before
  float* scratch;          // [3, P]
  int64_t num_queries, num_subspaces, key_dim, value_dim, padded_codes;
  bool euclidean;
};

template <int kLanes>
DPQ_INLINE float sum(const typename Lanes<kLanes>::Floats& lanes) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// exp(x) for x <= 0, to 2 in the last place: 2^n * e^r with |r| <= ln(2)/2 (Cephes' expf).
template <int kLanes>
DPQ_INLINE typename Lanes<kLanes>::Floats exp_of_negative(typename Lanes<kLanes>::Floats x) {
  using Floats = typename Lanes<kLanes>::Floats;
  using Ints = typename Lanes<kLanes>::Ints;
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the last bits
  x = x > -87.0f ? x : Floats{} - 87.0f;
  const Floats n = (x * kLog2E + kRounding) - kRounding;
  const Floats r = x - n * kLn2High - n * kLn2Low;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Floats mantissa = p * r * r + r + 1.0f;
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  Floats power;
  std::memcpy(&power, &exponent, sizeof(power));
  return mantissa * power;
}

// One query and one subspace, and room for its K scores, weights and pulls. kDim is the width of keys and values where
// both are the same and known, else 0.
template <int kDim>
struct Choice {
  const Args& a;
  int64_t n, j;
  int64_t P = a.padded_codes, X = kDim ? kDim : a.key_dim, S = kDim ? kDim : a.value_dim;
  int64_t at = n * a.num_subspaces + j;
  const float *query = a.queries + at * X, *keys = a.keys + j * X * P;
  const float *gradient = a.gradients + at * S, *values = a.values + j * S * P;
  float *scores = a.scratch, *weights = a.scratch + P, *pulls = a.scratch + 2 * P;
};

// Scores, and logits in the place of weights; the highest logit.
template <bool kEuclidean, int kDim, int kLanes>
DPQ_INLINE float score_codes(const Choice<kDim>& c) {
  using V = Lanes<kLanes>;
  using Floats = typename V::Floats;
  Floats highest = Floats{} - std::numeric_limits<float>::infinity();
  for (int64_t k = 0; k < c.P; k += kLanes) {
    Floats score = Floats{};
    for (int64_t x = 0; x < c.X; ++x) {
      const Floats key = V::load(c.keys + x * c.P + k);
      if (kEuclidean) {
        const Floats difference = key - c.query[x];
        score -= difference * difference;
      } else {
        score += key * c.query[x];
      }
    }
    const Floats logit = score * V::load(c.a.scale + k) + V::load(c.a.shift + k);
    highest = logit > highest ? logit : highest;
    V::store(c.scores + k, score);
    V::store(c.weights + k, logit);
  }
  float top = highest[0];
  for (int i = 1; i < kLanes; ++i) top = std::max(top, highest[i]);
  return top;
}

struct Sums {
  float weights, pulls;  // over codes, of the weights, and of weight * pull
};

// Weights that do not add up to one yet, and pulls: what the loss gains from more of each code's value.
template <int kDim, int kLanes>
DPQ_INLINE Sums weigh_codes(const Choice<kDim>& c, float top) {
  using V = Lanes<kLanes>;
  using Floats = typename V::Floats;
  Floats sum_of_weights = Floats{}, sum_of_pulls = Floats{};
  for (int64_t k = 0; k < c.P; k += kLanes) {
    Floats pull = Floats{};
    for (int64_t s = 0; s < c.S; ++s) pull += V::load(c.values + s * c.P + k) * c.gradient[s];
    const Floats weight = exp_of_negative<kLanes>(V::load(c.weights + k) - top);
    sum_of_weights += weight;
    sum_of_pulls += weight * pull;
    V::store(c.weights + k, weight);
    V::store(c.pulls + k, pull);
  }
  return {sum<kLanes>(sum_of_weights), sum<kLanes>(sum_of_pulls)};
}

template <bool kEuclidean, int kDim, int kLanes>
DPQ_INLINE void add_gradients(const Choice<kDim>& c, Sums sums) {
  using V = Lanes<kLanes>;
  using Floats = typename V::Floats;
  const float inverse = 1 / sums.weights, mean_pull = sums.pulls * inverse;
  Floats query_gradient[kDim ? kDim : 1] = {};
  float* key_gradients = c.a.key_gradients + c.j * c.X * c.P;
  float* value_gradients = c.a.value_gradients + c.j * c.S * c.P;
  float* query_out = c.a.query_gradients + c.at * c.X;
  const auto add = [](float* to, const Floats& more) __attribute__((always_inline)) {
    V::store(to, V::load(to) + more);
  };
  for (int64_t k = 0; k < c.P; k += kLanes) {
    const Floats weight = V::load(c.weights + k) * inverse;
    const Floats of_logit = weight * (V::load(c.pulls + k) - mean_pull);
    add(c.a.shift_gradients + k, of_logit);
    add(c.a.scale_gradients + k, of_logit * V::load(c.scores + k));
    const Floats of_score = of_logit * V::load(c.a.scale + k);
    for (int64_t x = 0; x < c.X; ++x) {
      const Floats key = V::load(c.keys + x * c.P + k);
      const Floats towards_key = kEuclidean ? 2 * of_score * (key - c.query[x]) : of_score * key;
      add(key_gradients + x * c.P + k, kEuclidean ? -towards_key : of_score * c.query[x]);
      if (kDim) {
        query_gradient[kDim ? x : 0] += towards_key;
      } else {
        query_out[x] += sum<kLanes>(towards_key);
      }
    }
    for (int64_t s = 0; s < c.S; ++s) add(value_gradients + s * c.P + k, weight * c.gradient[s]);
  }
  for (int x = 0; x < kDim; ++x) query_out[x] = sum<kLanes>(query_gradient[x]);
}

template <bool kEuclidean, int kDim, int kLanes>
DPQ_INLINE void every_choice(const Args& a) {
  constexpr int64_t kBlock = 64;  // queries per visit of a subspace, so that its keys and values stay in the cache
  for (int64_t start = 0; start < a.num_queries; start += kBlock) {
    const int64_t stop = std::min(start + kBlock, a.num_queries);
    for (int64_t j = 0; j < a.num_subspaces; ++j) {
      for (int64_t n = start; n < stop; ++n) {
        const Choice<kDim> choice{a, n, j};
        const float top = score_codes<kEuclidean, kDim, kLanes>(choice);
        add_gradients<kEuclidean, kDim, kLanes>(choice, weigh_codes<kDim, kLanes>(choice, top));
      }
    }
  }
}

template <bool kEuclidean, int kLanes>
DPQ_INLINE void by_width(const Args& a) {
  const int64_t width = a.key_dim == a.value_dim ? a.key_dim : 0;
  if (width == 2) return every_choice<kEuclidean, 2, kLanes>(a);
  if (width == 4) return every_choice<kEuclidean, 4, kLanes>(a);
  if (width == 8) return every_choice<kEuclidean, 8, kLanes>(a);
  every_choice<kEuclidean, 0, kLanes>(a);
}

template <int kLanes>
DPQ_INLINE void loop(const Args& a) {
  a.euclidean ? by_width<true, kLanes>(a) : by_width<false, kLanes>(a);
}

DPQ_DEFINE_BY_LANES(find_gradients, loop, Args)

using dpq::array;
using dpq::Array;
using dpq::check_shape;
using dpq::size_of;

void softmax_gradients(Array<const float, 3> queries, Array<const float, 3> keys, Array<const float, 3> values,
                       Array<const float, 1> scale, Array<const float, 1> shift, Array<const float, 3> gradients,
                       Array<float, 3> query_gradients, Array<float, 3> key_gradients,
                       Array<float, 3> value_gradients, Array<float, 1> scale_gradients,
                       Array<float, 1> shift_gradients, bool euclidean) {
  const int64_t num_subspaces = size_of(queries, 1), key_dim = size_of(queries, 2);
  const int64_t value_dim = size_of(gradients, 2), padded_codes = size_of(keys, 2);
  dpq::check_padded_codes(padded_codes);
  check_shape("gradients", gradients, {size_of(queries), num_subspaces, value_dim});
  check_shape("query_gradients", query_gradients, {size_of(queries), num_subspaces, key_dim});
  check_shape("keys", keys, {num_subspaces, key_dim, padded_codes});
  check_shape("key_gradients", key_gradients, {num_subspaces, key_dim, padded_codes});
  check_shape("values", values, {num_subspaces, value_dim, padded_codes});
  check_shape("value_gradients", value_gradients, {num_subspaces, value_dim, padded_codes});
  check_shape("scale", scale, {padded_codes});
  check_shape("scale_gradients", scale_gradients, {padded_codes});
  check_shape("shift", shift, {padded_codes});
  check_shape("shift_gradients", shift_gradients, {padded_codes});
  std::vector<float> scratch(3 * padded_codes);
  const Args args{queries.data(),
                  keys.data(),
                  values.data(),
                  scale.data(),
                  shift.data(),
                  gradients.data(),
                  query_gradients.data(),
                  key_gradients.data(),
                  value_gradients.data(),
                  scale_gradients.data(),
                  shift_gradients.data(),
                  scratch.data(),
                  size_of(queries),
                  num_subspaces,
                  key_dim,
                  value_dim,
                  padded_codes,
                  euclidean};
  nb::gil_scoped_release release;
  find_gradients(args);
}

}  // namespace

void define_softmax_gradients(nb::module_& m) {
  m.def("softmax_gradients", &softmax_gradients, array("queries"), array("keys"), array("values"), array("scale"),
        array("shift"), array("gradients"), array("query_gradients"), array("key_gradients"),
        array("value_gradients"), array("scale_gradients"), array("shift_gradients"), nb::arg("euclidean"));
}
