// Rows to vectors. Its plain twin is decode in reference.py, which the tests hold it to bit for bit.

#include "decode.h"

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

template <int kLanes, typename Number>
DPQ_INLINE void decode_to(const dpq::DecodeArgs& a) {
  dpq::with_vectors<kLanes, true>(a.source, a.tail, [&](const auto& vectors) DPQ_INLINE_LAMBDA {
    Store<kLanes, Number> store{static_cast<Number*>(a.out), a.source.dim};
    *a.damage = dpq::walk(vectors, a.rows, a.begin, a.end, a.num_lookups, store);
  });
}

template <int kLanes>
DPQ_INLINE void decode_loop(const dpq::DecodeArgs& a) {
  a.half ? decode_to<kLanes, uint16_t>(a) : decode_to<kLanes, float>(a);
}

DPQ_DEFINE_BY_LANES(decode_by_lanes, decode_loop, dpq::DecodeArgs)

nb::tuple decode(const dpq::Vectors& vectors, dpq::Array<const int64_t, 1> rows, dpq::Out out, int64_t num_threads) {
  const dpq::Source& source = vectors.source();
  dpq::check_threads(num_threads);
  dpq::check_out(out, dpq::size_of(rows), source.dim);
  const dpq::Parts parts(dpq::size_of(rows), num_threads);
  const int64_t tail_bytes = source.max_row_bytes + dpq::kRunSlackBytes;
  std::vector<uint8_t> tails(parts.num_parts * tail_bytes);
  std::vector<dpq::Damage> damage(parts.num_parts);
  {
    nb::gil_scoped_release release;
    dpq::in_parts(parts.num_parts, num_threads, [&](int64_t part) {
      dpq::decode_rows(dpq::DecodeArgs{source, rows.data(), parts.begin(part), parts.end(part), parts.num_rows, out.data(),
                             dpq::is_half(out), tails.data() + part * tail_bytes, &damage[part]});
    });
  }
  return dpq::first_of(damage);
}

}  // namespace

void dpq::decode_rows(const DecodeArgs& args) { decode_by_lanes(args); }

void define_decode(nb::module_& m) {
  nb::class_<dpq::Vectors>(m, "Vectors")
      .def(nb::init<dpq::Array<const float, 2>>(), dpq::array("dense"))
      .def(nb::init<const dpq::Vectors&, dpq::Vectors::Packed>(), nb::arg("others"), dpq::array("packed"))
      .def(nb::init<dpq::Vectors::Packed, dpq::Array<const float, 3>, int64_t, int64_t, bool>(), dpq::array("packed"), dpq::array("values"), nb::arg("num_subspaces"), nb::arg("code_bits"),
           nb::arg("shared"))
      .def_prop_ro("dim", &dpq::Vectors::dim);
  m.def("decode", &decode, nb::arg("vectors"), dpq::array("rows"), dpq::array("out"), nb::arg("num_threads"));
}
