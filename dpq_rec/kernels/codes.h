// Packed codes of a row, read where they lie.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace dpq {

// Code m of a row is bits m*b .. m*b+b-1 of its bit string, least significant first (design.md, contract 3). Codes are
// read where they lie: as bytes where b is 8, else out of the 4 bytes from their first one, which hold the 23 bits that
// a code reaches over at most (16 of them, begun at bit 7).
struct ByteCodes {
  const uint8_t* row;
  DPQ_INLINE int64_t operator[](int64_t m) const { return row[m]; }
};

struct BitCodes {
  const uint8_t* row;
  int64_t code_bits;
  DPQ_INLINE int64_t operator[](int64_t m) const {
    const uint64_t bit = m * code_bits;
    uint32_t window;
    std::memcpy(&window, row + bit / 8, sizeof(window));
    return window >> (bit % 8) & ((1u << code_bits) - 1);
  }
};
constexpr int64_t kSlackBytes = 3;  // read by BitCodes beyond the row at most
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files and BitCodes are little endian");

}  // namespace dpq
