// fp32 to fp16, rounded to nearest, ties to even, on every machine to the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace dpq {

// By hand, as vcvtps2ph does it: a NaN becomes a quiet one and keeps the head of its payload.
DPQ_INLINE uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65,520 on: infinity
  if (bits < 0x38800000) {  // below 2^-14: a multiple of 2^-24, which is the last place of numbers from 0.5 on
    std::memcpy(&value, &bits, sizeof(value));
    value += 0.5f;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1) - (112u << 23);  // half of the last place, the tie to even; 112: of the exponent
  return static_cast<uint16_t>(sign | bits >> 13);
}

// kPiece floats, at most kLanes, to `out`. kLanes names the instruction set, see simd.h: from 8 on it has the instruction.
// Intrinsics could not stand in a helper without a target; builtins can, they are checked where the code ends up.
template <int kLanes, int kPiece, typename Piece>
DPQ_INLINE void store_halves(const Piece& piece, uint16_t* out) {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  constexpr int kNearestEven = 0;
  if constexpr (kPiece == 16) {
    typedef short Halves __attribute__((vector_size(32)));
    const Halves halves = __builtin_ia32_vcvtps2ph512_mask(piece, kNearestEven, Halves{}, -1);
    std::memcpy(out, &halves, sizeof(halves));
    return;
  } else if constexpr (kPiece == 8) {
    const auto halves = __builtin_ia32_vcvtps2ph256(piece, kNearestEven);
    std::memcpy(out, &halves, sizeof(halves));
    return;
  } else if constexpr (kLanes >= 8) {
    typedef float Floats __attribute__((vector_size(16)));
    Floats floats{};
    std::memcpy(&floats, &piece, sizeof(piece));
    const auto halves = __builtin_ia32_vcvtps2ph(floats, kNearestEven);
    std::memcpy(out, &halves, kPiece * sizeof(uint16_t));
    return;
  }
#endif
  for (int i = 0; i < kPiece; ++i) out[i] = to_half(piece[i]);
}

}  // namespace dpq
