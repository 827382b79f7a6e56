// Packed codes of a row, read where they lie.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace dpq {

// Code m of a row is bits m*b .. m*b+b-1 of its bit string, least significant first (design.md, contract 3). Codes are
// read where they lie, one by one, or in a run of codes that follow each other.

// b is 8.
struct ByteCodes {
  const uint8_t* row;
  DPQ_INLINE int64_t operator[](int64_t m) const { return row[m]; }
  struct Run {
    uint64_t window;
    DPQ_INLINE int64_t next() {
      const uint64_t code = window & 0xff;
      window >>= 8;
      return static_cast<int64_t>(code);
    }
  };
  template <int kCodes>
  DPQ_INLINE Run run(int64_t m) const {
    Run run{0};
    std::memcpy(&run.window, row + m, kCodes);
    return run;
  }
};

// Out of the 4 bytes from their first one, which hold the 23 bits that a code reaches over at most (16 of them, begun at
// bit 7).
struct BitCodes {
  const uint8_t* row;
  int64_t code_bits;
  DPQ_INLINE int64_t operator[](int64_t m) const {
    const uint64_t bit = m * code_bits;
    uint32_t window;
    std::memcpy(&window, row + bit / 8, sizeof(window));
    return window >> (bit % 8) & ((1u << code_bits) - 1);
  }
  struct Run;
  template <int kCodes>
  DPQ_INLINE Run run(int64_t m) const;
};
struct BitCodes::Run {
  BitCodes codes;
  int64_t m;
  DPQ_INLINE int64_t next() { return codes[m++]; }
};
template <int kCodes>
DPQ_INLINE BitCodes::Run BitCodes::run(int64_t m) const {
  return {*this, m};
}

// b is 7 or less: a run of kMostOfRun codes lies in 8 bytes, with the 7 bits before it, and takes one read.
constexpr int kMostOfRun = 8;
struct NarrowCodes {
  const uint8_t* row;
  int64_t code_bits;
  DPQ_INLINE int64_t operator[](int64_t m) const { return BitCodes{row, code_bits}[m]; }
  struct Run {
    uint64_t window, mask;
    int64_t code_bits;
    DPQ_INLINE int64_t next() {
      const uint64_t code = window & mask;
      window >>= code_bits;
      return static_cast<int64_t>(code);
    }
  };
  template <int kCodes>
  DPQ_INLINE Run run(int64_t m) const {
    const uint64_t bit = m * code_bits;
    uint64_t window;
    std::memcpy(&window, row + bit / 8, sizeof(window));
    return {window >> (bit % 8), (uint64_t{1} << code_bits) - 1, code_bits};
  }
};
constexpr int64_t kSlackBytes = 3;     // read by BitCodes beyond the row at most
constexpr int64_t kRunSlackBytes = 7;  // likewise by a run of NarrowCodes
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files and BitCodes are little endian");

}  // namespace dpq
