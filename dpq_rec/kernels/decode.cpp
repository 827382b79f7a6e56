// Rows to vectors. Its plain twin is decode in reference.py, which the tests hold it to bit for bit.
// Shapes are trusted to fit each other (artifact.py checks a file's); what depends on the data is checked here.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "codes.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

using dpq::BitCodes;
using dpq::ByteCodes;
using dpq::kSlackBytes;

constexpr int64_t kMissingRow = -1;
constexpr int64_t kPrefetchRows = 24;  // rows between the one decoded and the one asked from memory
constexpr int64_t kCacheLine = 64;

struct DecodeArgs {
  const uint8_t* packed;  // [V, W]
  const float* values;    // [M, K, S], or [L, K, S] where shared
  const int64_t* rows;    // [N]
  float* out;             // [N, E]
  int64_t num_rows, num_lookups, row_bytes, num_levels, num_subspaces, num_codes, subspace_dim, code_bits;
  bool shared;
};

// What went wrong, and where. A lookup stops at the first bad row, so nothing is read outside the arrays.
struct DecodeResult {
  int64_t bad_row_at = -1;   // position in `rows` that is neither a row nor kMissingRow
  int64_t bad_code_at = -1;  // position in `rows` whose row holds a code >= num_codes
};

template <typename Codes>
DPQ_INLINE bool every_code_exists(const DecodeArgs& a, Codes codes) {
  if (a.num_codes == int64_t{1} << a.code_bits) return true;
  int64_t largest = 0;
  for (int64_t m = 0; m < a.num_levels * a.num_subspaces; ++m) largest = std::max(largest, codes[m]);
  return largest < a.num_codes;
}

// kPiece floats: a vector register or a part of one. The level-0 value is copied, those of higher levels are added.
template <int kPiece, bool kAdd>
DPQ_INLINE void emit_piece(const float* value, float* out) {
  typedef float Piece __attribute__((vector_size(kPiece * sizeof(float))));
  Piece piece;
  std::memcpy(&piece, value, sizeof(piece));
  if (kAdd) {
    Piece sum;
    std::memcpy(&sum, out, sizeof(sum));
    piece = sum + piece;
  }
  std::memcpy(out, &piece, sizeof(piece));
}

template <int kPiece, bool kAdd, typename Codes>
DPQ_INLINE void emit_level(const DecodeArgs& a, Codes codes, int64_t level, float* out) {
  const int64_t values_per_group = a.num_codes * a.subspace_dim;
  const int64_t subspace_stride = a.shared ? 0 : values_per_group;
  const int64_t first = level * a.num_subspaces;
  const float* values = a.values + (a.shared ? level : first) * values_per_group;
  if (a.subspace_dim == kPiece) {  // the common case, without an inner loop: half the time
#pragma GCC unroll 8
    for (int64_t j = 0; j < a.num_subspaces; ++j) {
      emit_piece<kPiece, kAdd>(values + j * subspace_stride + codes[first + j] * kPiece, out + j * kPiece);
    }
    return;
  }
  for (int64_t j = 0; j < a.num_subspaces; ++j) {
    const float* value = values + j * subspace_stride + codes[first + j] * a.subspace_dim;
    for (int64_t s = 0; s < a.subspace_dim; s += kPiece, out += kPiece) emit_piece<kPiece, kAdd>(value + s, out);
  }
}

template <int kPiece, typename Codes>
DPQ_INLINE bool decode_row(const DecodeArgs& a, Codes codes, float* out) {
  if (!every_code_exists(a, codes)) return false;
  emit_level<kPiece, false>(a, codes, 0, out);
  for (int64_t level = 1; level < a.num_levels; ++level) emit_level<kPiece, true>(a, codes, level, out);
  return true;
}

// The cost of a lookup is the cache miss on its row of codes: ask for it long before it is used.
DPQ_INLINE void prefetch_row(const DecodeArgs& a, int64_t n) {
  if (n >= a.num_lookups || a.rows[n] < 0 || a.rows[n] >= a.num_rows) return;
  const uint8_t* row = a.packed + a.rows[n] * a.row_bytes;
  __builtin_prefetch(row);
  for (int64_t byte = kCacheLine; byte < a.row_bytes; byte += kCacheLine) __builtin_prefetch(row + byte);
  __builtin_prefetch(row + a.row_bytes - 1);
}

// The arguments come by value: a copy that no pointer can reach stays in registers whatever is written to `out`.
// `tail` is room for one row and kSlackBytes.
template <int kPiece, bool kByteCodes>
DPQ_INLINE DecodeResult decode_loop(const DecodeArgs a, uint8_t* tail) {
  const int64_t dim = a.num_subspaces * a.subspace_dim;
  const int64_t last_with_slack = (a.num_rows - 1) * a.row_bytes - kSlackBytes;
  DecodeResult result;
  for (int64_t n = 0; n < a.num_lookups; ++n) {
    prefetch_row(a, n + kPrefetchRows);
    const int64_t row = a.rows[n];
    float* out = a.out + n * dim;
    if (row == kMissingRow) {
      std::memset(out, 0, sizeof(float) * dim);
      continue;
    }
    if (row < 0 || row >= a.num_rows) {
      result.bad_row_at = n;
      return result;
    }
    const uint8_t* packed = a.packed + row * a.row_bytes;
    bool decoded;
    if (kByteCodes) {
      decoded = decode_row<kPiece>(a, ByteCodes{packed}, out);
    } else {
      if (row * a.row_bytes > last_with_slack) {
        std::memcpy(tail, packed, a.row_bytes);
        packed = tail;
      }
      decoded = decode_row<kPiece>(a, BitCodes{packed, a.code_bits}, out);
    }
    if (!decoded) {
      result.bad_code_at = n;
      return result;
    }
  }
  return result;
}

template <bool kByteCodes>
DPQ_INLINE DecodeResult decode_in_pieces(const DecodeArgs& a, uint8_t* tail) {
  if (a.subspace_dim % 16 == 0) return decode_loop<16, kByteCodes>(a, tail);
  if (a.subspace_dim % 8 == 0) return decode_loop<8, kByteCodes>(a, tail);
  if (a.subspace_dim % 4 == 0) return decode_loop<4, kByteCodes>(a, tail);
  if (a.subspace_dim % 2 == 0) return decode_loop<2, kByteCodes>(a, tail);
  return decode_loop<1, kByteCodes>(a, tail);
}

DPQ_MULTIVERSION DecodeResult decode_rows(const DecodeArgs& a, uint8_t* tail) {
  return a.code_bits == 8 ? decode_in_pieces<true>(a, tail) : decode_in_pieces<false>(a, tail);
}

template <typename T, int kDims>
using Array = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

// Returns (position of the first bad row, position of the first bad code), -1 where there is none.
nb::tuple decode(Array<const uint8_t, 2> packed, Array<const float, 3> values, Array<const int64_t, 1> rows,
                 Array<float, 2> out, int64_t num_levels, int64_t num_subspaces, int64_t code_bits, bool shared) {
  const DecodeArgs args{packed.data(),
                        values.data(),
                        rows.data(),
                        out.data(),
                        static_cast<int64_t>(packed.shape(0)),
                        static_cast<int64_t>(rows.shape(0)),
                        static_cast<int64_t>(packed.shape(1)),
                        num_levels,
                        num_subspaces,
                        static_cast<int64_t>(values.shape(1)),
                        static_cast<int64_t>(values.shape(2)),
                        code_bits,
                        shared};
  DecodeResult result;
  {
    nb::gil_scoped_release release;
    std::vector<uint8_t> tail(args.row_bytes + kSlackBytes);
    result = decode_rows(args, tail.data());
  }
  return nb::make_tuple(result.bad_row_at, result.bad_code_at);
}

}  // namespace

void define_decode(nb::module_& m) { m.def("decode", &decode); }
