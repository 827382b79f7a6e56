// Queries to codes, and the module of all hot loops. Each has a plain numpy twin in tests/references.py, which the tests
// hold it to. What is exported to Python looks at its arguments; the loops beneath trust them.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "arrays.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

struct EncodeArgs {
  const float* queries;  // [N, D, S]
  const float* keys;     // [D, S, P]: transposed, the codes padded to P, a multiple of kMaxLanes
  const float* scale;    // [P]
  const float* shift;    // [P]: -inf for the padding, so that it never wins
  uint16_t* codes;       // [N, D]
  int64_t num_queries, num_subspaces, subspace_dim, padded_codes;
  bool euclidean;
};

// The highest of scale[k] * score[k] + shift[k], and the lowest such k. Every code's score is a sum over s in order,
// so a row's code depends on nothing but the row: not on the batch, the machine or the vector width.
template <bool kEuclidean, int kLanes>
DPQ_INLINE uint16_t best_code(const EncodeArgs& a, const float* query, const float* keys) {
  using V = dpq::Lanes<kLanes>;
  typename V::Floats best = typename V::Floats{} - std::numeric_limits<float>::infinity();
  typename V::Ints best_at = typename V::Ints{};
  typename V::Ints at;
  for (int i = 0; i < kLanes; ++i) at[i] = i;
  for (int64_t k = 0; k < a.padded_codes; k += kLanes) {
    typename V::Floats score = typename V::Floats{};
    for (int64_t s = 0; s < a.subspace_dim; ++s) {
      const typename V::Floats key = V::load(keys + s * a.padded_codes + k);
      if (kEuclidean) {
        const typename V::Floats difference = key - query[s];
        score -= difference * difference;
      } else {
        score += key * query[s];
      }
    }
    score = score * V::load(a.scale + k) + V::load(a.shift + k);
    const typename V::Ints better = score > best;
    best = better ? score : best;
    best_at = better ? at : best_at;
    at += kLanes;
  }
  int winner = 0;
  for (int i = 1; i < kLanes; ++i) {
    if (best[i] > best[winner] || (best[i] == best[winner] && best_at[i] < best_at[winner])) winner = i;
  }
  return static_cast<uint16_t>(best_at[winner]);
}

template <bool kEuclidean, int kLanes>
DPQ_INLINE void encode_by(const EncodeArgs& a) {
  constexpr int64_t kBlock = 64;  // queries per visit of a subspace, so that its keys stay in the first-level cache
  for (int64_t start = 0; start < a.num_queries; start += kBlock) {
    const int64_t stop = std::min(start + kBlock, a.num_queries);
    for (int64_t j = 0; j < a.num_subspaces; ++j) {
      const float* keys = a.keys + j * a.subspace_dim * a.padded_codes;
      for (int64_t n = start; n < stop; ++n) {
        const int64_t at = n * a.num_subspaces + j;
        a.codes[at] = best_code<kEuclidean, kLanes>(a, a.queries + at * a.subspace_dim, keys);
      }
    }
  }
}

template <int kLanes>
DPQ_INLINE void encode_loop(const EncodeArgs& a) {
  a.euclidean ? encode_by<true, kLanes>(a) : encode_by<false, kLanes>(a);
}

DPQ_DEFINE_BY_LANES(encode_queries, encode_loop, EncodeArgs)

using dpq::array;
using dpq::Array;
using dpq::check_shape;
using dpq::size_of;

void encode(Array<const float, 3> queries, Array<const float, 3> keys, Array<const float, 1> scale,
            Array<const float, 1> shift, Array<uint16_t, 2> codes, bool euclidean) {
  const int64_t num_subspaces = size_of(queries, 1), padded_codes = size_of(keys, 2);
  dpq::check_padded_codes(padded_codes);
  check_shape("keys", keys, {num_subspaces, size_of(queries, 2), padded_codes});
  check_shape("scale", scale, {padded_codes});
  check_shape("shift", shift, {padded_codes});
  check_shape("codes", codes, {size_of(queries), num_subspaces});
  const nb::gil_scoped_release release;
  encode_queries(EncodeArgs{queries.data(), keys.data(), scale.data(), shift.data(), codes.data(), size_of(queries),
                            num_subspaces, size_of(queries, 2), padded_codes, euclidean});
}

}  // namespace

void define_bags(nb::module_& m);               // bags.cpp
void define_central_moments(nb::module_& m);    // central_moments.cpp
void define_decode(nb::module_& m);             // decode.cpp
void define_decode_to_json(nb::module_& m);     // decode_to_json.cpp
void define_find_integers(nb::module_& m);      // find_integers.cpp
void define_find_rows(nb::module_& m);          // find_rows.cpp
void define_lookup(nb::module_& m);             // lookup.cpp
void define_map_file(nb::module_& m);           // map_file.cpp
void define_scan(nb::module_& m);               // scan.cpp
void define_softmax_gradients(nb::module_& m);  // softmax_gradients.cpp

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a table that some module keeps to the end of the process is none
  m.attr("LANES") = dpq::kMaxLanes;
  m.def("encode", &encode, array("queries"), array("keys"), array("scale"), array("shift"), array("codes"),
        nb::arg("euclidean"));
  define_bags(m);
  define_central_moments(m);
  define_decode(m);
  define_decode_to_json(m);
  define_find_integers(m);
  define_find_rows(m);
  define_lookup(m);
  define_map_file(m);
  define_scan(m);
  define_softmax_gradients(m);
}
