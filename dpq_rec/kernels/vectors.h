// Where the vectors of rows lie, and a walk over rows that gives each vector to a sink, piece by piece.
// Shapes are trusted to fit each other (source.h checks them); rows and codes are checked as they are read. Codes that
// change between the look at them and their use, in a file that another process writes to, give wrong numbers, and read
// nothing outside the values: `values` reaches as far as the bits of a code do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "arrays.h"
#include "codes.h"
#include "simd.h"

namespace dpq {

constexpr int64_t kPrefetchRows = 24;  // rows between the one decoded and the one asked from memory
constexpr int64_t kCacheLine = 64;

// What went wrong, and where. A walk stops at the first bad row, so nothing is read outside the arrays.
struct Damage {
  int64_t bad_row_at = -1;   // position in the rows that holds neither a row nor kMissingRow
  int64_t bad_code_at = -1;  // position in the rows whose row holds a code >= num_codes
  bool any() const { return bad_row_at >= 0 || bad_code_at >= 0; }
};

// Rows first_row .. end_row - 1 of a table, which have as many levels.
struct Tier {
  const uint8_t* packed;  // [end_row - first_row, row_bytes]
  int64_t first_row, end_row, row_bytes, num_levels;
};

struct Source {
  const Tier* tiers;     // by rising rows; null where the vectors are dense
  const float* values;   // [M, K, S], or [L, K, S] where shared; and (2^b - K) * S numbers more
  const float* vectors;  // [V, E] where dense
  int64_t num_tiers, num_rows, dim, max_row_bytes, max_levels, num_subspaces, num_codes, subspace_dim, code_bits;
  bool shared;
};

DPQ_INLINE const Tier& tier_of(const Source& a, int64_t row) {
  const Tier* tier = a.tiers;
  while (row >= tier->end_row) ++tier;
  return *tier;
}

DPQ_INLINE const uint8_t* packed_at(const Tier& tier, int64_t row) {
  return tier.packed + (row - tier.first_row) * tier.row_bytes;
}

// Asks for bytes from memory, each line once: to ask again takes the place of another line that is on its way.
DPQ_INLINE void prefetch_bytes(const void* from, int64_t num_bytes) {
  const uint8_t* line = reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(from) / kCacheLine * kCacheLine);
  const uint8_t* const end = static_cast<const uint8_t*>(from) + num_bytes;
  do {
    __builtin_prefetch(line);
    line += kCacheLine;
  } while (line < end);
}

// Bytes behind a row that are read with it: where they begin a line, that line is waited for as the row's own are.
DPQ_INLINE int64_t read_beyond(const Source& a) {
  if (a.code_bits == 8) return 0;
  return a.code_bits < 8 ? kRunSlackBytes + 1 - a.code_bits : kSlackBytes;
}

// Room for the copy of a row that is read with what lies behind it; none where nothing is.
inline int64_t tail_bytes(const Source& a) { return read_beyond(a) == 0 ? 0 : a.max_row_bytes + kRunSlackBytes; }

// Asks for a row of any kind.
DPQ_INLINE void prefetch_row(const Source& a, int64_t row) {
  if (a.tiers == nullptr) return prefetch_bytes(a.vectors + row * a.dim, a.dim * sizeof(float));
  const Tier& tier = tier_of(a, row);
  prefetch_bytes(packed_at(tier, row), tier.row_bytes + read_beyond(a));
}

template <int kPiece>
struct Piece {
  typedef float Floats __attribute__((vector_size(kPiece * sizeof(float))));
};

template <int kPiece>
DPQ_INLINE void load_piece(const float* from, typename Piece<kPiece>::Floats& to) {
  std::memcpy(&to, from, sizeof(to));
}

constexpr int kNoPiece = 0;  // for a sink that takes a row's codes, and not what they stand for

// Vectors as codes, which are read as Codes; kPlain is of one level and so of one tier. kIsFull is further of bytes, 256
// codes, and whole runs of subspaces that share nothing: the shape of most tables, and where their values lie is known
// when this is compiled. The arguments come by value: a copy that no pointer can reach stays in registers whatever is
// written.
template <int kPiece, typename Codes, bool kPlain, bool kIsFull = false>
struct Coded {
  const Source a;
  uint8_t* tail;     // room for one row and kRunSlackBytes
  const Tier first;  // of the tiers

  DPQ_INLINE int64_t num_codes() const { return kIsFull ? 256 : a.num_codes; }
  DPQ_INLINE bool shared() const { return !kIsFull && a.shared; }

  DPQ_INLINE const Tier& tier_of(int64_t row) const { return kPlain ? first : dpq::tier_of(a, row); }

  DPQ_INLINE void prefetch(int64_t row) const {
    const Tier& tier = tier_of(row);
    prefetch_bytes(packed_at(tier, row), tier.row_bytes + read_beyond(a));
  }

  // False where a code is none: then the sink has got nothing.
  template <typename Sink>
  DPQ_INLINE bool emit(int64_t row, Sink& sink) const {
    const Tier& tier = tier_of(row);
    const uint8_t* packed = packed_at(tier, row);
    if constexpr (std::is_same_v<Codes, ByteCodes>) {
      return emit_codes(Codes{packed}, tier.num_levels, sink);
    } else {
      if ((row + 1 - tier.first_row) * tier.row_bytes + kRunSlackBytes >
          (tier.end_row - tier.first_row) * tier.row_bytes) {
        std::memcpy(tail, packed, tier.row_bytes);
        packed = tail;
      }
      return emit_codes(Codes{packed, a.code_bits}, tier.num_levels, sink);
    }
  }

  template <typename Sink>
  DPQ_INLINE bool emit_codes(const Codes& codes, int64_t num_levels, Sink& sink) const {
    if (kPlain) num_levels = 1;
    if (!every_code_exists(codes, num_levels * a.num_subspaces)) return false;
    if constexpr (kPiece == kNoPiece) {
      sink.put(codes);
    } else {
      emit_values(codes, num_levels, sink);
    }
    return true;
  }

  template <typename Sink>
  DPQ_INLINE void emit_values(const Codes& codes, int64_t num_levels, Sink& sink) const {
    int64_t j = 0;
    if (kIsFull || a.subspace_dim == kPiece) {
      for (; j + kMostOfRun <= a.num_subspaces; j += kMostOfRun) emit_run<kMostOfRun>(codes, num_levels, j, sink);
      if (kIsFull) return;
      for (; j + 4 <= a.num_subspaces; j += 4) emit_run<4>(codes, num_levels, j, sink);
    }
    for (; j < a.num_subspaces; ++j) {
      for (int64_t s = 0; s < a.subspace_dim; s += kPiece) emit_piece(codes, num_levels, j, s, sink);
    }
  }

  DPQ_INLINE bool every_code_exists(const Codes& codes, int64_t num_codes_of_row) const {
    if (kIsFull || a.num_codes == int64_t{1} << a.code_bits) return true;
    int64_t largest = 0, m = 0;
    for (; m + kMostOfRun <= num_codes_of_row; m += kMostOfRun) {
      auto run = codes.template run<kMostOfRun>(m);
      for (int i = 0; i < kMostOfRun; ++i) largest = std::max(largest, run.next());
    }
    for (; m < num_codes_of_row; ++m) largest = std::max(largest, codes[m]);
    return largest < a.num_codes;
  }

  // Groups j .. j + kGroups - 1, of kPiece numbers each: level 0's values, and those of higher levels added in order.
  template <int kGroups, typename Sink>
  DPQ_INLINE void emit_run(const Codes& codes, int64_t num_levels, int64_t j, Sink& sink) const {
    const int64_t group_values = num_codes() * kPiece;
    const int64_t stride = shared() ? 0 : group_values;
    const float* values = a.values + j * stride;
    typename Piece<kPiece>::Floats sums[kGroups], value;
    auto run = codes.template run<kGroups>(j);
#pragma GCC unroll 8
    for (int i = 0; i < kGroups; ++i) load_piece<kPiece>(values + i * stride + run.next() * kPiece, sums[i]);
    for (int64_t level = 1; level < num_levels; ++level) {
      values += shared() ? group_values : a.num_subspaces * group_values;
      run = codes.template run<kGroups>(level * a.num_subspaces + j);
#pragma GCC unroll 8
      for (int i = 0; i < kGroups; ++i) {
        load_piece<kPiece>(values + i * stride + run.next() * kPiece, value);
        sums[i] = sums[i] + value;
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kGroups; ++i) sink.template put<kPiece>((j + i) * kPiece, sums[i]);
  }

  // Numbers s .. s + kPiece - 1 of group j.
  template <typename Sink>
  DPQ_INLINE void emit_piece(const Codes& codes, int64_t num_levels, int64_t j, int64_t s, Sink& sink) const {
    const int64_t group_values = a.num_codes * a.subspace_dim;
    const float* values = a.values + (a.shared ? 0 : j * group_values) + s;
    typename Piece<kPiece>::Floats sum, value;
    load_piece<kPiece>(values + codes[j] * a.subspace_dim, sum);
    for (int64_t level = 1; level < num_levels; ++level) {
      values += a.shared ? group_values : a.num_subspaces * group_values;
      load_piece<kPiece>(values + codes[level * a.num_subspaces + j] * a.subspace_dim, value);
      sum = sum + value;
    }
    sink.template put<kPiece>(j * a.subspace_dim + s, sum);
  }
};

// Vectors as they are.
template <int kLanes>
struct Dense {
  const Source a;

  DPQ_INLINE void prefetch(int64_t row) const { prefetch_bytes(a.vectors + row * a.dim, a.dim * sizeof(float)); }

  template <typename Sink>
  DPQ_INLINE bool emit(int64_t row, Sink& sink) const {
    const float* vector = a.vectors + row * a.dim;
    int64_t s = 0;
    typename Piece<kLanes>::Floats piece;
    typename Piece<1>::Floats number;
    for (; s + kLanes <= a.dim; s += kLanes) {
      load_piece<kLanes>(vector + s, piece);
      sink.template put<kLanes>(s, piece);
    }
    for (; s < a.dim; ++s) {
      load_piece<1>(vector + s, number);
      sink.template put<1>(s, number);
    }
    return true;
  }
};

// Gives the vectors of rows[begin] .. rows[end - 1] to the sink. The cost of a row is the cache miss on it, so it is
// asked from memory long before it is used; rows up to `last` may be.
template <typename Vectors, typename Sink>
DPQ_INLINE Damage walk(const Vectors vectors, const int64_t* rows, int64_t begin, int64_t end, int64_t last,
                       Sink& sink) {
  const uint64_t num_rows = static_cast<uint64_t>(vectors.a.num_rows);  // so that one comparison finds what is below 0
  Damage damage;
  for (int64_t n = begin; n < end; ++n) {
    if (n + kPrefetchRows < last) {
      const int64_t ahead = rows[n + kPrefetchRows];
      if (static_cast<uint64_t>(ahead) < num_rows) vectors.prefetch(ahead);
    }
    const int64_t row = rows[n];
    if (static_cast<uint64_t>(row) >= num_rows) {
      if (row != kMissingRow) {
        damage.bad_row_at = n;
        return damage;
      }
      sink.missing(n);
      continue;
    }
    sink.at(n);
    if (!vectors.emit(row, sink)) {
      damage.bad_code_at = n;
      return damage;
    }
  }
  return damage;
}

// body(vectors) with the kind of vectors that the source has. kSpecial also makes loops for one level and tier.
template <int kPiece, typename Codes, bool kSpecial, typename Body>
DPQ_INLINE void with_levels(const Source& a, uint8_t* tail, const Body& body) {
  if constexpr (kSpecial) {
    const bool is_plain = a.max_levels == 1 && a.num_tiers == 1;
    if constexpr (kPiece != kNoPiece && std::is_same_v<Codes, ByteCodes>) {
      const bool is_full =
          a.num_codes == 256 && !a.shared && a.subspace_dim == kPiece && a.num_subspaces % kMostOfRun == 0;
      if (is_plain && is_full) return body(Coded<kPiece, Codes, true, true>{a, tail, *a.tiers});
    }
    if (is_plain) return body(Coded<kPiece, Codes, true>{a, tail, *a.tiers});
  }
  return body(Coded<kPiece, Codes, false>{a, tail, *a.tiers});
}

template <int kPiece, bool kSpecial, typename Body>
DPQ_INLINE void with_codes(const Source& a, uint8_t* tail, const Body& body) {
  if (a.code_bits == 8) return with_levels<kPiece, ByteCodes, kSpecial>(a, tail, body);
  if (a.code_bits < 8) return with_levels<kPiece, NarrowCodes, kSpecial>(a, tail, body);
  return with_levels<kPiece, BitCodes, kSpecial>(a, tail, body);
}

template <int kLanes, bool kSpecial, typename Body>
DPQ_INLINE void with_vectors(const Source& a, uint8_t* tail, const Body& body) {
  if (a.tiers == nullptr) return body(Dense<kLanes>{a});
  if (kLanes >= 16 && a.subspace_dim % 16 == 0) return with_codes<(kLanes >= 16 ? 16 : 1), kSpecial>(a, tail, body);
  if (kLanes >= 8 && a.subspace_dim % 8 == 0) return with_codes<(kLanes >= 8 ? 8 : 1), kSpecial>(a, tail, body);
  if (a.subspace_dim % 4 == 0) return with_codes<4, kSpecial>(a, tail, body);
  if (a.subspace_dim % 2 == 0) return with_codes<2, kSpecial>(a, tail, body);
  return with_codes<1, kSpecial>(a, tail, body);
}

}  // namespace dpq
