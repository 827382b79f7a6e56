// Rows to pooled bags: each vector is added to its bag's as it is decoded, and is nowhere in between. Its plain twin is
// decode_bags in tests/references.py, which the tests hold it to bit for bit.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "half.h"
#include "simd.h"
#include "source.h"
#include "threads.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

struct BagsArgs {
  const dpq::Source& source;
  const int64_t* rows;   // [num_lookups]
  const float* weights;  // [num_lookups]; null where all are 1
  const int64_t* ends;   // of bag b: its rows are those from ends[b - 1], or 0, up to ends[b] - 1
  int64_t first_bag, end_bag, num_lookups;
  void* out;  // [B, E], float or half
  bool half, mean;
  float* sum;     // [E], room for a bag's
  uint8_t* tail;  // room for one row and kRunSlackBytes
  dpq::Damage* damage;
};

// Adds vectors, in fp32 and in the order of the rows. Where there are no weights each is 1, and the product exact.
struct Add {
  float* const sum;
  const float* const weights;
  int64_t num_found = 0;
  float weight = 1;

  DPQ_INLINE void at(int64_t n) {
    ++num_found;
    if (weights != nullptr) weight = weights[n];
  }
  DPQ_INLINE void missing(int64_t) {}
  template <int kPiece>
  DPQ_INLINE void put(int64_t s, const typename dpq::Piece<kPiece>::Floats& piece) {
    typename dpq::Piece<kPiece>::Floats before;
    dpq::load_piece<kPiece>(sum + s, before);
    before = before + piece * weight;
    std::memcpy(sum + s, &before, sizeof(before));
  }
};

template <int kLanes>
DPQ_INLINE void round_to_half(const float* sum, int64_t dim, uint16_t* out) {
  int64_t s = 0;
  typename dpq::Piece<kLanes>::Floats piece;
  for (; s + kLanes <= dim; s += kLanes) {
    dpq::load_piece<kLanes>(sum + s, piece);
    dpq::store_halves<kLanes, kLanes>(piece, out + s);
  }
  for (; s < dim; ++s) out[s] = dpq::to_half(sum[s]);
}

template <int kLanes, typename Vectors>
DPQ_INLINE dpq::Damage pool(const BagsArgs& a, const Vectors& vectors) {
  const int64_t dim = a.source.dim;
  for (int64_t bag = a.first_bag; bag < a.end_bag; ++bag) {
    float* sum = a.half ? a.sum : static_cast<float*>(a.out) + bag * dim;
    std::memset(sum, 0, sizeof(float) * dim);
    Add add{sum, a.weights};
    const int64_t begin = bag == 0 ? 0 : a.ends[bag - 1];
    const dpq::Damage damage = dpq::walk(vectors, a.rows, begin, a.ends[bag], a.num_lookups, add);
    if (damage.any()) return damage;
    if (a.mean && add.num_found > 1) {
      const float count = static_cast<float>(add.num_found);
      for (int64_t s = 0; s < dim; ++s) sum[s] /= count;
    }
    if (a.half) round_to_half<kLanes>(sum, dim, static_cast<uint16_t*>(a.out) + bag * dim);
  }
  return dpq::Damage{};
}

template <int kLanes>
DPQ_INLINE void pool_loop(const BagsArgs& a) {
  dpq::with_vectors<kLanes, false>(a.source, a.tail, [&](const auto& vectors) DPQ_INLINE_LAMBDA {
    *a.damage = pool<kLanes>(a, vectors);
  });
}

DPQ_DEFINE_BY_LANES(pool_bags, pool_loop, BagsArgs)

// Where each bag ends, of the rows of each.
std::vector<int64_t> ends_of(const dpq::Array<const int64_t, 1>& lengths, int64_t num_rows) {
  std::vector<int64_t> ends(lengths.size());
  int64_t end = 0;
  for (size_t bag = 0; bag < ends.size(); ++bag) {
    dpq::check_range("bag_lengths", lengths.data()[bag], 0, num_rows - end);
    end += lengths.data()[bag];
    ends[bag] = end;
  }
  if (end != num_rows) dpq::refuse("bag_lengths", "a sum of " + std::to_string(end), std::to_string(num_rows) + ", of all rows");
  return ends;
}

nb::tuple decode_bags(const dpq::Vectors& vectors, dpq::Array<const int64_t, 1> rows,
                      std::optional<dpq::Array<const float, 1>> weights, dpq::Array<const int64_t, 1> lengths,
                      bool mean, dpq::Out out, int64_t num_threads) {
  const dpq::Source& source = vectors.source();
  const int64_t num_bags = dpq::size_of(lengths), num_rows = dpq::size_of(rows);
  dpq::check_threads(num_threads);
  dpq::check_out(out, num_bags, source.dim);
  if (weights) dpq::check_shape("weights", *weights, {num_rows});
  const std::vector<int64_t> ends = ends_of(lengths, num_rows);
  const int64_t bags_of_part = dpq::kItemsOfPart * num_bags / std::max({num_bags, num_rows, int64_t{1}});
  const auto pool = [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> tail(dpq::tail_bytes(source));
    std::vector<float> sum(source.dim);
    dpq::Damage damage;
    pool_bags(BagsArgs{source, rows.data(), weights ? weights->data() : nullptr, ends.data(), begin, end, num_rows,
                       out.data(), dpq::is_half(out), mean, sum.data(), tail.data(), &damage});
    return damage;
  };
  return dpq::first_of(dpq::in_parts(num_bags, num_threads, std::max<int64_t>(bags_of_part, 1), pool));
}

}  // namespace

void define_bags(nb::module_& m) {
  m.def("decode_bags", &decode_bags, nb::arg("vectors"), dpq::array("rows"), dpq::array("weights").none(),
        dpq::array("bag_lengths"), nb::arg("mean"), dpq::array("out"), nb::arg("num_threads"));
}
