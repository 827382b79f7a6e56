// Bounds of the scores of 64 rows at a time, with the byte permutations of AVX-512 VBMI (Ice Lake, Zen 4, and later).
//
// After "Cache locality is not enough" (Andre, Kermarrec, Le Scouarnec, 2015): scores as bytes in registers, and the sum
// of a row's bytes compared with what is wanted. Bytes are rounded up, so that nothing is lost: what passes is scored
// again exactly, in scan.cpp: 0.1 % of the rows of PQ codes of clustered vectors, 1.4 % where the best come last. A search
// of a million rows of 16 codes is 4.2 times as fast as faiss's IndexPQ with bounds, on a Zen 5 with AVX-512; without, on
// another machine that has no AVX-512, 1.2 times.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "codes.h"
#include "scan.h"
#include "simd.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define DPQ_HAS_VBMI __builtin_cpu_supports("avx512vbmi")
#define DPQ_VBMI __attribute__((target("arch=x86-64-v4,avx512vbmi")))
#include <immintrin.h>
#endif

namespace dpq {
namespace {

constexpr int kTableBytes = 256;            // of each group: a byte for each code that 8 bits can name
constexpr int64_t kGroup = 8;               // codes that are read at once: of b bits they fill b whole bytes
constexpr int64_t kMostCodes = 65535 / 255;  // of a row, whose bytes add up to no more than 16 bits hold

// The smallest and the largest score of a group; false where one is not finite.
bool limits_of(const float* scores, int64_t num_codes, double* low, double* high) {
  *low = *high = scores[0];
  for (int64_t k = 0; k < num_codes; ++k) {
    if (!std::isfinite(scores[k])) return false;
    *low = std::min<double>(*low, scores[k]);
    *high = std::max<double>(*high, scores[k]);
  }
  return true;
}

}  // namespace

#ifdef DPQ_VBMI

std::unique_ptr<Bounds> Bounds::of(const ScanArgs& args) {
  if (!DPQ_HAS_VBMI || args.code_bits > 8 || args.codes_per_row > kMostCodes) return nullptr;
  std::unique_ptr<Bounds> bounds(new Bounds(args));
  return bounds->num_rows_ > 0 ? std::move(bounds) : nullptr;
}

Bounds::Bounds(const ScanArgs& args) : args_(args), bytes_(new uint8_t[args.codes_per_row * kTableBytes]()) {
  double widest = 0, base = 0, largest = 0;
  for (int64_t m = 0; m < args.codes_per_row; ++m) {
    double low, high;
    if (!limits_of(args.scores + (m << args.code_bits), args.num_codes, &low, &high)) return;
    base += low;
    widest = std::max(widest, high - low);
    largest += std::max(std::abs(low), std::abs(high));
  }
  if (largest > std::numeric_limits<float>::max()) return;
  step_ = static_cast<float>(widest / 254);
  if (widest > 0 && step_ < std::numeric_limits<float>::min()) return;
  // An exact score is a sum of M numbers in fp32, which rounds M times at most; a bound rounds a few times more.
  const double rounding = largest * (args.codes_per_row + 4) * std::numeric_limits<float>::epsilon();
  base_ = static_cast<float>(base + rounding + 4 * std::numeric_limits<float>::denorm_min());
  for (int64_t m = 0; m < args.codes_per_row; ++m) round_up(args.scores + (m << args.code_bits), m);
  for (int i = 0; i < 64; ++i) {
    shifts_[i] = static_cast<uint8_t>(i % 8 * args.code_bits);  // byte j of a quad word is its bits from j * b on
    by_code_[i] = static_cast<uint8_t>(i % 8 * 8 + i / 8);      // then byte i of quad word j is code j of row i
  }
  const int64_t read = (args.codes_per_row - 1) / kGroup * args.code_bits + 8;  // bytes, from a row's first on
  const int64_t last = args.num_rows * args.row_bytes - std::max(read, args.row_bytes + kSlackBytes);
  num_rows_ = last < 0 ? 0 : (last / args.row_bytes + 1) / kRows * kRows;
}

void Bounds::round_up(const float* scores, int64_t group) {
  if (step_ == 0) return;
  const double low = *std::min_element(scores, scores + args_.num_codes);
  for (int64_t k = 0; k < args_.num_codes; ++k) {
    bytes_[group * kTableBytes + k] = static_cast<uint8_t>(std::min(std::ceil((scores[k] - low) / step_), 255.0));
  }
}

namespace {

constexpr int64_t kRunRows = 16;
constexpr int64_t kCacheLine = 64;
// Blocks of rows between the one that is read and the one asked from memory: rows are read from four runs in turn, which
// no prefetcher of a processor sees through.
constexpr int64_t kBlocksAhead = 4;

// Where the row of a byte lane stands among 64: so that words, and then double words, come apart into runs of 16 rows.
constexpr int64_t row_of_lane(int64_t lane) { return lane % 4 * kRunRows + lane / 4; }

// Transposes 8 x 8 quad words.
DPQ_VBMI DPQ_INLINE void transpose_quads(__m512i (&q)[8]) {
  __m512i pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi64(q[i], q[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi64(q[i], q[i + 1]);
  }
  for (int half = 0; half < 8; half += 4) {
    for (int odd = 0; odd < 2; ++odd) {
      const __m512i a = pairs[half + odd], b = pairs[half + 2 + odd];
      fours[half + odd] = _mm512_shuffle_i64x2(a, b, 0x88);      // blocks 0 and 2 of each
      fours[half + 2 + odd] = _mm512_shuffle_i64x2(a, b, 0xdd);  // 1 and 3
    }
  }
  for (int odd = 0; odd < 2; ++odd) {
    q[0 + odd] = _mm512_shuffle_i64x2(fours[odd], fours[4 + odd], 0x88);
    q[4 + odd] = _mm512_shuffle_i64x2(fours[odd], fours[4 + odd], 0xdd);
    q[2 + odd] = _mm512_shuffle_i64x2(fours[2 + odd], fours[6 + odd], 0x88);
    q[6 + odd] = _mm512_shuffle_i64x2(fours[2 + odd], fours[6 + odd], 0xdd);
  }
}

// Lane of a quad word, from memory: blended in, since shuffles are what there is least room for.
template <int kLane>
DPQ_VBMI DPQ_INLINE __m512i insert_quad(__m512i quads, const uint8_t* from) {
  const __m128i quad = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return kLane == 0 ? _mm512_zextsi128_si512(quad) : _mm512_mask_broadcastq_epi64(quads, 1 << kLane, quad);
}

// Quad words of the rows of lanes 8 i to 8 i + 7; `runs` are the first rows of the four runs, `at` that of row 2 i.
DPQ_VBMI DPQ_INLINE __m512i load_quads(const uint8_t* const (&runs)[4], int64_t at, int64_t row_bytes) {
  __m512i quads = insert_quad<0>(_mm512_undefined_epi32(), runs[0] + at);
  quads = insert_quad<1>(quads, runs[1] + at);
  quads = insert_quad<2>(quads, runs[2] + at);
  quads = insert_quad<3>(quads, runs[3] + at);
  at += row_bytes;
  quads = insert_quad<4>(quads, runs[0] + at);
  quads = insert_quad<5>(quads, runs[1] + at);
  quads = insert_quad<6>(quads, runs[2] + at);
  return insert_quad<7>(quads, runs[3] + at);
}

// codes[j]: code 8 * group + j of 64 rows, a byte each, in the order of lanes.
DPQ_VBMI DPQ_INLINE void read_codes(const ScanArgs& a, const uint8_t* rows, int64_t group, __m512i shifts,
                                    __m512i by_code, __m512i (&codes)[8]) {
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << a.code_bits) - 1));
  const uint8_t* const first = rows + group * a.code_bits;
  const int64_t run_bytes = kRunRows * a.row_bytes;
  const uint8_t* const runs[4] = {first, first + run_bytes, first + 2 * run_bytes, first + 3 * run_bytes};
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i quads = load_quads(runs, 2 * i * a.row_bytes, a.row_bytes);
    const __m512i by_row = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, quads), mask);
    codes[i] = _mm512_permutexvar_epi8(by_code, by_row);
  }
  transpose_quads(codes);
}

// The bytes of 64 codes of a group.
DPQ_VBMI DPQ_INLINE __m512i look_up(const uint8_t* table, int64_t code_bits, __m512i codes) {
  if (code_bits <= 6) return _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(table));
  const __m512i low =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes, _mm512_loadu_si512(table + 64));
  if (code_bits == 7) return low;
  const __m512i high =
      _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), codes, _mm512_loadu_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
}

// Bits of 16 rows whose bound is above `worst`, or is none since a scale is negative or no number.
DPQ_VBMI DPQ_INLINE uint64_t above(__m512 bound, const float* scales, __m512 worst) {
  if (scales == nullptr) return _mm512_cmp_ps_mask(bound, worst, _CMP_NLE_UQ);
  const __m512 scale = _mm512_loadu_ps(scales);
  return _mm512_cmp_ps_mask(_mm512_mul_ps(bound, scale), worst, _CMP_NLE_UQ) |
         _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_NGE_UQ);
}

}  // namespace

DPQ_VBMI uint64_t Bounds::candidates(int64_t first, float worst) const {
  const ScanArgs& a = args_;
  const int64_t bits = a.code_bits;
  const __m512i shifts = _mm512_loadu_si512(shifts_), by_code = _mm512_loadu_si512(by_code_);
  const __m512i low_bytes = _mm512_set1_epi16(0xff), low_words = _mm512_set1_epi32(0xffff);
  const __m512i last_code = _mm512_set1_epi8(static_cast<char>(a.num_codes - 1));
  const bool may_be_bad = a.num_codes < int64_t{1} << bits;
  __m512i even = _mm512_setzero_si512(), odd = even, codes[8];
  __mmask64 bad = 0;
  const int64_t block_bytes = kRows * a.row_bytes;
  const uint8_t* const ahead = a.packed + first * a.row_bytes + kBlocksAhead * block_bytes;
  for (int64_t byte = 0; byte < block_bytes; byte += kCacheLine) __builtin_prefetch(ahead + byte);
  for (int64_t m = 0; m < a.codes_per_row; ++m) {
    if (m % kGroup == 0) read_codes(a, a.packed + first * a.row_bytes, m / kGroup, shifts, by_code, codes);
    const __m512i bytes = look_up(bytes_.get() + m * kTableBytes, bits, codes[m % kGroup]);
    even = _mm512_add_epi16(even, _mm512_and_si512(bytes, low_bytes));
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
    if (may_be_bad) bad |= _mm512_cmpgt_epu8_mask(codes[m % kGroup], last_code);
  }
  const __m512 base = _mm512_set1_ps(base_), step = _mm512_set1_ps(step_), least = _mm512_set1_ps(worst);
  const __m512i sums[4] = {_mm512_and_si512(even, low_words), _mm512_and_si512(odd, low_words),
                           _mm512_srli_epi32(even, 16), _mm512_srli_epi32(odd, 16)};
  uint64_t found = 0;
  for (int run = 0; run < 4; ++run) {
    const float* scales = a.scales == nullptr ? nullptr : a.scales + first + kRunRows * run;
    const __m512 bound = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[run]), step, base);
    found |= above(bound, scales, least) << kRunRows * run;
  }
  for (uint64_t lanes = bad; lanes != 0; lanes &= lanes - 1) {
    found |= uint64_t{1} << row_of_lane(__builtin_ctzll(lanes));
  }
  return found;
}

#else

std::unique_ptr<Bounds> Bounds::of(const ScanArgs&) { return nullptr; }

uint64_t Bounds::candidates(int64_t, float) const { return ~uint64_t{0}; }

#endif

}  // namespace dpq
