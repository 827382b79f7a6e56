// The hot loops. Each has a plain numpy twin in reference.py, which the tests hold it to bit for bit.
// Shapes are trusted to fit each other (artifact.py checks a file's); what depends on the data is checked here.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
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

void encode(Array<const float, 3> queries, Array<const float, 3> keys, Array<const float, 1> scale,
            Array<const float, 1> shift, Array<uint16_t, 2> codes, bool euclidean) {
  const EncodeArgs args{queries.data(),
                        keys.data(),
                        scale.data(),
                        shift.data(),
                        codes.data(),
                        static_cast<int64_t>(queries.shape(0)),
                        static_cast<int64_t>(queries.shape(1)),
                        static_cast<int64_t>(queries.shape(2)),
                        static_cast<int64_t>(keys.shape(2)),
                        euclidean};
  nb::gil_scoped_release release;
  encode_queries(args);
}

}  // namespace

void define_central_moments(nb::module_& m);    // central_moments.cpp
void define_find_rows(nb::module_& m);          // find_rows.cpp
void define_scan(nb::module_& m);               // scan.cpp
void define_softmax_gradients(nb::module_& m);  // softmax_gradients.cpp

NB_MODULE(_native, m) {
  m.attr("LANES") = dpq::kMaxLanes;
  m.def("decode", &decode);
  m.def("encode", &encode);
  define_central_moments(m);
  define_find_rows(m);
  define_scan(m);
  define_softmax_gradients(m);
}
