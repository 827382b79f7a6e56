// Scores of all rows from their codes, and the best of them: no vector is decoded. Its numpy twin is
// reference.scan_top, which the tests hold it to bit for bit.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "arrays.h"
#include "codes.h"
#include "scan.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

using dpq::BitCodes;
using dpq::Bounds;
using dpq::ByteCodes;
using dpq::kSlackBytes;
using dpq::ScanArgs;

constexpr int64_t kRowsAtOnce = 8;  // sums that go on beside each other: one of M numbers in a row waits for its adder

struct Found {
  float score;
  int64_t row;
};

// Higher scores come first, of equal ones the lower row.
DPQ_INLINE bool comes_first(const Found& a, const Found& b) {
  return a.score > b.score || (a.score == b.score && a.row < b.row);
}

// The best rows so far: a heap whose top is the worst of them.
class Best {
 public:
  Best(std::vector<Found>& heap, size_t most) : heap_(heap), most_(most) { note_worst(); }

  DPQ_INLINE bool wants(float score) const { return score > worst_; }
  DPQ_INLINE float worst() const { return worst_; }

  // Rows come in ascending order, so that one of the worst score is no better than what is there.
  void add(const Found& found) {
    if (heap_.size() == most_) {
      std::pop_heap(heap_.begin(), heap_.end(), comes_first);
      heap_.back() = found;
    } else {
      heap_.push_back(found);
    }
    std::push_heap(heap_.begin(), heap_.end(), comes_first);
    note_worst();
  }

 private:
  void note_worst() {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    worst_ = heap_.size() < most_ ? -kInfinity : most_ == 0 ? kInfinity : heap_.front().score;
  }

  std::vector<Found>& heap_;
  size_t most_;
  float worst_;
};

// The scores of kRowsAtOnce rows, each a sum over its codes in their order. One that is no number, of a code that there
// is not or of values that are none, stays so.
template <typename Codes>
DPQ_INLINE void add_up(const ScanArgs& a, const Codes (&rows)[kRowsAtOnce], float (&sums)[kRowsAtOnce]) {
  for (int64_t i = 0; i < kRowsAtOnce; ++i) sums[i] = a.scores[rows[i][0]];
  for (int64_t m = 1; m < a.codes_per_row; ++m) {
    const float* scores = a.scores + (m << a.code_bits);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRowsAtOnce; ++i) sums[i] += scores[rows[i][m]];
  }
}

DPQ_INLINE ByteCodes codes_at(const uint8_t* row, int64_t, ByteCodes*) { return {row}; }
DPQ_INLINE BitCodes codes_at(const uint8_t* row, int64_t code_bits, BitCodes*) { return {row, code_bits}; }

// Some rows, in ascending order, and where the table's bytes lie from the row `origin` on.
struct Some {
  const uint8_t* packed;
  int64_t origin;
  int64_t rows[kRowsAtOnce];
  int64_t count;
};

// Takes some rows into the best. The first one whose score is no number, or infinitely low; -1 where there is none.
template <typename Codes>
DPQ_INLINE int64_t scan_some(const ScanArgs& a, const Some& some, Best& best) {
  Codes rows[kRowsAtOnce];
  for (int64_t i = 0; i < kRowsAtOnce; ++i) {  // where they are fewer, the first takes the places of the others
    const int64_t row = some.rows[i < some.count ? i : 0];
    rows[i] = codes_at(some.packed + (row - some.origin) * a.row_bytes, a.code_bits, static_cast<Codes*>(nullptr));
  }
  float sums[kRowsAtOnce];
  add_up(a, rows, sums);
  for (int64_t i = 0; i < some.count; ++i) {
    const int64_t row = some.rows[i];
    const float score = a.scales == nullptr ? sums[i] : sums[i] * a.scales[row];
    if (!(score > -std::numeric_limits<float>::infinity())) return row;
    if (best.wants(score)) best.add({score, a.first_row + row});
  }
  return -1;
}

// The rows from first to last - 1, one behind the other.
template <typename Codes>
DPQ_INLINE int64_t scan_run(const ScanArgs& a, const uint8_t* packed, int64_t origin, int64_t first, int64_t last,
                            Best& best) {
  for (; first < last; first += kRowsAtOnce) {
    Some some{packed, origin, {}, std::min(kRowsAtOnce, last - first)};
    for (int64_t i = 0; i < kRowsAtOnce; ++i) some.rows[i] = first + i;
    const int64_t bad = scan_some<Codes>(a, some, best);
    if (bad >= 0) return bad;
  }
  return -1;
}

// Those of the first rows that may be among the best.
template <typename Codes>
DPQ_INLINE int64_t scan_candidates(const ScanArgs& a, const Bounds& bounds, Best& best) {
  for (int64_t first = 0; first < bounds.num_rows(); first += Bounds::kRows) {
    uint64_t left = bounds.candidates(first, best.worst());
    while (left != 0) {
      Some some{a.packed, 0, {}, 0};
      for (; left != 0 && some.count < kRowsAtOnce; left &= left - 1) {
        some.rows[some.count++] = first + __builtin_ctzll(left);
      }
      const int64_t bad = scan_some<Codes>(a, some, best);
      if (bad >= 0) return bad;
    }
  }
  return -1;
}

template <typename Codes>
DPQ_INLINE int64_t scan_rows(const ScanArgs& a, const Bounds* bounds, Best& best) {
  // BitCodes read kSlackBytes beyond a row: the last rows are read from a copy that has them.
  const int64_t tail_rows = std::min(a.num_rows, kSlackBytes / a.row_bytes + 1);
  const int64_t first = bounds == nullptr ? 0 : bounds->num_rows(), last = a.num_rows - tail_rows;
  const int64_t tail_bytes = tail_rows * a.row_bytes;
  std::vector<uint8_t> tail(tail_bytes + kSlackBytes);
  std::memcpy(tail.data(), a.packed + last * a.row_bytes, tail_bytes);
  int64_t bad = bounds == nullptr ? -1 : scan_candidates<Codes>(a, *bounds, best);
  if (bad < 0) bad = scan_run<Codes>(a, a.packed, 0, first, last, best);
  if (bad < 0) bad = scan_run<Codes>(a, tail.data(), last, last, a.num_rows, best);
  return bad;
}

DPQ_MULTIVERSION int64_t scan_all(const ScanArgs& a, const Bounds* bounds, Best& best) {
  return a.code_bits == 8 ? scan_rows<ByteCodes>(a, bounds, best) : scan_rows<BitCodes>(a, bounds, best);
}

using dpq::Array;
using dpq::check_shape;
using dpq::size_of;

// Takes the rows of one part of a table into the best so far, [k] rows and scores of which the first num_found are some.
// Returns (how many there are now, position of the first row without a score or -1).
nb::tuple scan_top(Array<const uint8_t, 2> packed, Array<const float, 2> scores,
                   std::optional<Array<const float, 1>> scales, int64_t num_codes, int64_t code_bits,
                   int64_t first_row, Array<int64_t, 1> best_rows, Array<float, 1> best_scores, int64_t num_found) {
  dpq::check_range("code_bits", code_bits, 1, 16);
  dpq::check_range("num_codes", num_codes, 1, int64_t{1} << code_bits);
  dpq::check_range("groups", size_of(scores), 1, INT32_MAX);
  check_shape("scores", scores, {size_of(scores), int64_t{1} << code_bits});
  check_shape("packed", packed, {size_of(packed), (size_of(scores) * code_bits + 7) / 8});
  if (scales) check_shape("scales", *scales, {size_of(packed)});
  check_shape("best_scores", best_scores, {size_of(best_rows)});
  dpq::check_range("num_found", num_found, 0, size_of(best_rows));
  dpq::check_range("first_row", first_row, 0, INT64_MAX - size_of(packed));
  const ScanArgs args{packed.data(),    scores.data(),      scales ? scales->data() : nullptr,
                      size_of(packed),  size_of(packed, 1), size_of(scores),
                      num_codes,        code_bits,          first_row};
  std::vector<Found> heap;
  int64_t bad = -1;
  {
    nb::gil_scoped_release release;
    const size_t most = best_rows.shape(0);
    heap.reserve(most);
    for (int64_t i = 0; i < num_found; ++i) heap.push_back({best_scores.data()[i], best_rows.data()[i]});
    std::make_heap(heap.begin(), heap.end(), comes_first);
    Best best(heap, most);
    const std::unique_ptr<Bounds> bounds = Bounds::of(args);
    bad = scan_all(args, bounds.get(), best);
    std::sort(heap.begin(), heap.end(), comes_first);
    for (size_t i = 0; i < heap.size(); ++i) {
      best_rows.data()[i] = heap[i].row;
      best_scores.data()[i] = heap[i].score;
    }
  }
  return nb::make_tuple(static_cast<int64_t>(heap.size()), bad);
}

}  // namespace

void define_scan(nb::module_& m) {
  m.def("scan_top", &scan_top, dpq::array("packed"), dpq::array("scores"), dpq::array("scales").none(),
        nb::arg("num_codes"), nb::arg("code_bits"), nb::arg("first_row"), dpq::array("best_rows"),
        dpq::array("best_scores"), nb::arg("num_found"));
}
