// What the scan and its bounds share.
#pragma once

#include <cstdint>
#include <memory>

namespace dpq {

struct ScanArgs {
  const uint8_t* packed;  // [V, W]
  const float* scores;    // [M, 2^b]: of each code of each group with the query; NaN where there is no such code
  const float* scales;    // [V]: each row's score is multiplied by; null where it stays
  int64_t num_rows, row_bytes, codes_per_row, num_codes, code_bits;
  int64_t first_row;  // of the table, where this part of it begins
};

// Which of 64 rows may have a score above the worst that is kept: what is not named does not, what is named may not
// either. Scores rounded up to bytes lie in vector registers, 64 codes are looked up at a time.
class Bounds {
 public:
  static constexpr int64_t kRows = 64;

  // None where the machine lacks AVX-512 VBMI, codes are wider than a byte, or scores are not finite.
  static std::unique_ptr<Bounds> of(const ScanArgs& args);

  // Rows that can be asked for: fewer than all, since more is read than a row.
  int64_t num_rows() const { return num_rows_; }

  // Bit i: row first + i, whose score may be above `worst`, or which holds a code that there is not.
  uint64_t candidates(int64_t first, float worst) const;

 private:
  explicit Bounds(const ScanArgs& args);
  void round_up(const float* scores, int64_t group);

  const ScanArgs& args_;
  std::unique_ptr<uint8_t[]> bytes_;   // [M, 256]: of each code, in steps above its group's lowest score
  float base_ = 0, step_ = 0;          // a score is at most base + step * the sum of its bytes
  uint8_t shifts_[64], by_code_[64];   // of bits in a quad word; of bytes among 8 quad words
  int64_t num_rows_ = 0;
};

}  // namespace dpq
