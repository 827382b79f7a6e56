// Rows to vectors, as other loops call it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace dpq {

struct DecodeArgs {
  Source source;
  const int64_t* rows;  // [num_lookups], of which begin .. end - 1 are decoded
  int64_t begin, end, num_lookups;
  void* out;  // [num_lookups, E], float or half
  bool half;
  uint8_t* tail;  // room for one row and kRunSlackBytes
  Damage* damage;
};

void decode_rows(const DecodeArgs& args);

// Parts of a number of rows that threads take one by one.
struct Parts {
  static constexpr int64_t kOfPart = 1024;  // some 15 microseconds of work

  int64_t num_rows, rows_of_part, num_parts;

  Parts(int64_t num_rows_, int64_t num_threads)
      : num_rows(num_rows_), rows_of_part(num_threads > 1 ? kOfPart : std::max<int64_t>(num_rows, 1)),
        num_parts((num_rows + rows_of_part - 1) / rows_of_part) {}
  int64_t begin(int64_t part) const { return part * rows_of_part; }
  int64_t end(int64_t part) const { return std::min(begin(part) + rows_of_part, num_rows); }
};

}  // namespace dpq
