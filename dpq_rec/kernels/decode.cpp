// Rows to vectors. Its plain twin is decode in tests/references.py, which the tests hold it to bit for bit.

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

constexpr int64_t kRowsToWriteAhead = 12;  // rows of output between the one written and the one asked from memory

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

struct DecodeArgs {
  const dpq::Source& source;
  const int64_t* rows;
  int64_t begin, end, last;
  void* out;
  bool half;
  uint8_t* tail;  // room for one row and kRunSlackBytes
  dpq::Damage* damage;
};

template <int kLanes, typename Number>
DPQ_INLINE void decode_to(const DecodeArgs& a) {
  dpq::with_vectors<kLanes, true>(a.source, a.tail, [&](const auto& vectors) DPQ_INLINE_LAMBDA {
    Store<kLanes, Number> store{static_cast<Number*>(a.out), a.source.dim};
    *a.damage = dpq::walk(vectors, a.rows, a.begin, a.end, a.last, store);
  });
}

template <int kLanes>
DPQ_INLINE void decode_loop(const DecodeArgs& a) {
  a.half ? decode_to<kLanes, uint16_t>(a) : decode_to<kLanes, float>(a);
}

DPQ_DEFINE_BY_LANES(decode_by_lanes, decode_loop, DecodeArgs)

nb::tuple decode(const dpq::Vectors& vectors, dpq::Array<const int64_t, 1> rows, dpq::Out out, int64_t num_threads) {
  const int64_t num_rows = dpq::size_of(rows);
  dpq::check_threads(num_threads);
  dpq::check_out(out, num_rows, vectors.dim());
  return dpq::first_of(dpq::in_parts(num_rows, num_threads, dpq::kItemsOfPart, [&](int64_t begin, int64_t end) {
    return dpq::decode_rows(vectors.source(), rows.data(), begin, end, num_rows, out.data(), dpq::is_half(out));
  }));
}

}  // namespace

dpq::Damage dpq::decode_rows(const Source& source, const int64_t* rows, int64_t begin, int64_t end, int64_t last,
                             void* out, bool half) {
  std::vector<uint8_t> tail(tail_bytes(source));
  Damage damage;
  decode_by_lanes(DecodeArgs{source, rows, begin, end, last, out, half, tail.data(), &damage});
  return damage;
}

void define_decode(nb::module_& m) {
  nb::class_<dpq::Vectors>(m, "Vectors")
      .def(nb::init<dpq::Array<const float, 2>>(), dpq::array("dense"))
      .def(nb::init<const dpq::Vectors&, dpq::Vectors::Packed>(), nb::arg("others"), dpq::array("packed"))
      .def(nb::init<dpq::Vectors::Packed, dpq::Array<const float, 3>, int64_t, int64_t, bool>(), dpq::array("packed"),
           dpq::array("values"), nb::arg("num_subspaces"), nb::arg("code_bits"), nb::arg("shared"))
      .def_prop_ro("dim", &dpq::Vectors::dim);
  m.def("decode", &decode, nb::arg("vectors"), dpq::array("rows"), dpq::array("out"), nb::arg("num_threads"));
}
