// Moments of queries about their mean, from which those of all scores follow (nn/level.py), and the way back.
// Their plain twins are central_moments and central_moments_gradient in tests/references.py.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arrays.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

// With c = query - mean and r = c.c, of each subspace: E[c c^T], E[r c], E[r], E[r^2], one behind the other.
struct Sizes {
  int64_t num_queries, num_subspaces, subspace_dim;
  int64_t covariance() const { return subspace_dim * subspace_dim; }
  int64_t per_subspace() const { return covariance() + subspace_dim + 2; }
};

struct Forward {
  const float* queries;  // [N, D, S]
  const float* mean;     // [D, S]
  const float* weights;  // [N]
  float* block;          // [D, per_subspace], zeros: sums of a block in fp32, of all blocks in fp64
  double* sums;          // [D, per_subspace], zeros before
  Sizes sizes;
};

template <int kDim>
DPQ_INLINE void add_query(const Forward& a, int64_t n, int64_t j, float* centred) {
  const int64_t S = kDim ? kDim : a.sizes.subspace_dim;
  const float* query = a.queries + (n * a.sizes.num_subspaces + j) * S;
  const float* mean = a.mean + j * S;
  float* covariance = a.block + j * a.sizes.per_subspace();
  float* third = covariance + S * S;
  float squared = 0;
  for (int64_t s = 0; s < S; ++s) centred[s] = query[s] - mean[s];
  for (int64_t s = 0; s < S; ++s) squared += centred[s] * centred[s];
  const float weight = a.weights[n];
  for (int64_t s = 0; s < S; ++s) {
    const float weighted = weight * centred[s];
    for (int64_t t = 0; t < S; ++t) covariance[s * S + t] += weighted * centred[t];
    third[s] += weighted * squared;
  }
  third[S] += weight * squared;
  third[S + 1] += weight * squared * squared;
}

template <int kDim>
DPQ_INLINE void add_all(const Forward& a) {
  constexpr int64_t kBlock = 256;
  std::vector<float> generic(kDim ? 0 : a.sizes.subspace_dim);
  float known[kDim ? kDim : 1];
  float* centred = kDim ? known : generic.data();
  const int64_t size = a.sizes.num_subspaces * a.sizes.per_subspace();
  for (int64_t start = 0; start < a.sizes.num_queries; start += kBlock) {
    const int64_t stop = std::min(start + kBlock, a.sizes.num_queries);
    for (int64_t n = start; n < stop; ++n) {
      for (int64_t j = 0; j < a.sizes.num_subspaces; ++j) add_query<kDim>(a, n, j, centred);
    }
    for (int64_t i = 0; i < size; ++i) {
      a.sums[i] += a.block[i];
      a.block[i] = 0;
    }
  }
}

DPQ_MULTIVERSION void forward(const Forward& a) {
  if (a.sizes.subspace_dim == 2) return add_all<2>(a);
  if (a.sizes.subspace_dim == 4) return add_all<4>(a);
  if (a.sizes.subspace_dim == 8) return add_all<8>(a);
  add_all<0>(a);
}

struct Backward {
  const float* queries;    // [N, D, S]
  const float* mean;       // [D, S]
  const float* weights;    // [N]
  const float* gradients;  // [D, per_subspace]; that of the covariance symmetric
  float* out;              // [N, D, S]
  Sizes sizes;
};

template <int kDim>
DPQ_INLINE void gradient_of_query(const Backward& a, int64_t n, int64_t j, float* centred) {
  const int64_t S = kDim ? kDim : a.sizes.subspace_dim;
  const int64_t at = (n * a.sizes.num_subspaces + j) * S;
  const float* mean = a.mean + j * S;
  const float* of_covariance = a.gradients + j * a.sizes.per_subspace();
  const float* of_third = of_covariance + S * S;
  float squared = 0, along = 0;
  for (int64_t s = 0; s < S; ++s) centred[s] = a.queries[at + s] - mean[s];
  for (int64_t s = 0; s < S; ++s) squared += centred[s] * centred[s];
  for (int64_t s = 0; s < S; ++s) along += centred[s] * of_third[s];
  const float radial = 2 * along + 2 * of_third[S] + 4 * of_third[S + 1] * squared;
  float* out = a.out + at;
  for (int64_t s = 0; s < S; ++s) out[s] = radial * centred[s] + squared * of_third[s];
  for (int64_t t = 0; t < S; ++t) {
    for (int64_t s = 0; s < S; ++s) out[s] += 2 * centred[t] * of_covariance[t * S + s];
  }
  for (int64_t s = 0; s < S; ++s) out[s] *= a.weights[n];
}

template <int kDim>
DPQ_INLINE void gradient_of_all(const Backward& a) {
  std::vector<float> generic(kDim ? 0 : a.sizes.subspace_dim);
  float known[kDim ? kDim : 1];
  float* centred = kDim ? known : generic.data();
  for (int64_t n = 0; n < a.sizes.num_queries; ++n) {
    for (int64_t j = 0; j < a.sizes.num_subspaces; ++j) gradient_of_query<kDim>(a, n, j, centred);
  }
}

DPQ_MULTIVERSION void backward(const Backward& a) {
  if (a.sizes.subspace_dim == 2) return gradient_of_all<2>(a);
  if (a.sizes.subspace_dim == 4) return gradient_of_all<4>(a);
  if (a.sizes.subspace_dim == 8) return gradient_of_all<8>(a);
  gradient_of_all<0>(a);
}

using dpq::array;
using dpq::Array;
using dpq::check_shape;
using dpq::size_of;

Sizes sizes_of(const Array<const float, 3>& queries) {
  return {static_cast<int64_t>(queries.shape(0)), static_cast<int64_t>(queries.shape(1)),
          static_cast<int64_t>(queries.shape(2))};
}

void check_sizes(const Sizes& sizes, const Array<const float, 2>& mean, const Array<const float, 1>& weights) {
  check_shape("mean", mean, {sizes.num_subspaces, sizes.subspace_dim});
  check_shape("weights", weights, {sizes.num_queries});
}

void central_moments(Array<const float, 3> queries, Array<const float, 2> mean, Array<const float, 1> weights,
                     Array<double, 2> sums) {
  const Sizes sizes = sizes_of(queries);
  check_sizes(sizes, mean, weights);
  check_shape("sums", sums, {sizes.num_subspaces, sizes.per_subspace()});
  nb::gil_scoped_release release;
  std::vector<float> block(sizes.num_subspaces * sizes.per_subspace());
  forward({queries.data(), mean.data(), weights.data(), block.data(), sums.data(), sizes});
}

void central_moments_gradient(Array<const float, 3> queries, Array<const float, 2> mean,
                              Array<const float, 1> weights, Array<const float, 2> gradients, Array<float, 3> out) {
  const Sizes sizes = sizes_of(queries);
  check_sizes(sizes, mean, weights);
  check_shape("gradients", gradients, {sizes.num_subspaces, sizes.per_subspace()});
  check_shape("out", out, {sizes.num_queries, sizes.num_subspaces, sizes.subspace_dim});
  nb::gil_scoped_release release;
  backward({queries.data(), mean.data(), weights.data(), gradients.data(), out.data(), sizes});
}

}  // namespace

void define_central_moments(nb::module_& m) {
  m.def("central_moments", &central_moments, array("queries"), array("mean"), array("weights"), array("sums"));
  m.def("central_moments_gradient", &central_moments_gradient, array("queries"), array("mean"), array("weights"),
        array("gradients"), array("out"));
}
