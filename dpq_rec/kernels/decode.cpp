// Rows to vectors. Its plain twin is decode in reference.py, which the tests hold it to bit for bit.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "half.h"
#include "simd.h"
#include "source.h"
#include "threads.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kRowsOfPart = 1024;      // of one thread at a time: some 15 microseconds of work
constexpr int64_t kRowsToWriteAhead = 12;  // rows of output between the one written and the one asked from memory

struct DecodeArgs {
  dpq::Source source;
  const int64_t* rows;  // [num_lookups], of which begin .. end - 1 are decoded
  int64_t begin, end, num_lookups;
  void* out;  // [num_lookups, E], float or half
  bool half;
  uint8_t* tail;  // room for one row and kRunSlackBytes
  dpq::Damage* damage;
};

// Takes the vector of position n to row n of the output.
template <int kLanes, typename Number>
struct Store {
  Number* const out;
  const int64_t dim;
  Number* vector = nullptr;

  // Half the time of a large lookup is its output's: lines are asked for before they are written.
  DPQ_INLINE void at(int64_t n) {
    vector = out + n * dim;
    for (int64_t s = 0; s < dim; s += dpq::kCacheLine / sizeof(Number)) {
      __builtin_prefetch(vector + kRowsToWriteAhead * dim + s, 1);
    }
  }
  DPQ_INLINE void missing(int64_t n) { std::memset(out + n * dim, 0, sizeof(Number) * dim); }
  template <int kPiece>
  DPQ_INLINE void put(int64_t s, const typename dpq::Piece<kPiece>::Floats& piece) {
    if constexpr (sizeof(Number) == sizeof(float)) {
      std::memcpy(vector + s, &piece, sizeof(piece));
    } else {
      dpq::store_halves<kLanes, kPiece>(piece, vector + s);
    }
  }
};

template <int kLanes, typename Number>
DPQ_INLINE void decode_to(const DecodeArgs& a) {
  dpq::with_vectors<kLanes, true>(a.source, a.tail, [&](const auto& vectors) DPQ_INLINE_LAMBDA {
    Store<kLanes, Number> store{static_cast<Number*>(a.out), a.source.dim};
    *a.damage = dpq::walk(vectors, a.rows, a.begin, a.end, a.num_lookups, store);
  });
}

template <int kLanes>
DPQ_INLINE void decode_loop(const DecodeArgs& a) {
  a.half ? decode_to<kLanes, uint16_t>(a) : decode_to<kLanes, float>(a);
}

DPQ_DEFINE_BY_LANES(decode_rows, decode_loop, DecodeArgs)

nb::tuple decode(const dpq::Vectors& vectors, dpq::Array<const int64_t, 1> rows, dpq::Out out, int64_t num_threads) {
  const dpq::Source& source = vectors.source();
  const int64_t num_lookups = static_cast<int64_t>(rows.shape(0));
  const int64_t rows_of_part = num_threads > 1 ? kRowsOfPart : std::max<int64_t>(num_lookups, 1);
  const int64_t num_parts = (num_lookups + rows_of_part - 1) / rows_of_part;
  const int64_t tail_bytes = source.max_row_bytes + dpq::kRunSlackBytes;
  std::vector<uint8_t> tails(num_parts * tail_bytes);
  std::vector<dpq::Damage> damage(num_parts);
  {
    nb::gil_scoped_release release;
    dpq::in_parts(num_parts, num_threads, [&](int64_t part) {
      const int64_t begin = part * rows_of_part, end = std::min(begin + rows_of_part, num_lookups);
      decode_rows(DecodeArgs{source, rows.data(), begin, end, num_lookups, out.data(), dpq::is_half(out),
                             tails.data() + part * tail_bytes, &damage[part]});
    });
  }
  return dpq::first_of(damage);
}

}  // namespace

void define_decode(nb::module_& m) {
  nb::class_<dpq::Vectors>(m, "Vectors")
      .def(nb::init<dpq::Array<const float, 2>>())
      .def(nb::init<std::vector<std::pair<dpq::Array<const uint8_t, 2>, int64_t>>, dpq::Array<const float, 3>, int64_t,
                    int64_t, bool>());
  m.def("decode", &decode);
}
