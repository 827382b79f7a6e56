// Integers to rows. Its plain twin is find_integer_rows in tests/references.py, which the tests hold it to.
// What the tree says is checked against the ids themselves.

#include "find_integers.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "arrays.h"
#include "simd.h"

namespace nb = nanobind;

namespace {

using dpq::kMissingRow;
using dpq::Level;
using dpq::load;

constexpr int64_t kNone = -1;
constexpr int64_t kNode = 16;       // keys of a node, ids of a leaf: two cache lines
constexpr int64_t kLineKeys = 8;    // keys of a cache line
constexpr int64_t kTogether = 128;  // ids searched in step, so that their cache misses overlap

struct FindArgs {
  const int64_t* asked;  // [num_asked]
  const int64_t* ids;    // [num_ids] ascending
  const uint32_t* rows;  // [num_ids]
  const Level* levels;   // [num_levels], the root first
  int64_t* out;          // [num_asked]
  int64_t* bad_at;       // position of the first id that the tree led astray
  int64_t num_asked, num_ids, num_levels;
};

// How many of kNode ascending keys are not above the id; some number from 0 to kNode where they do not ascend.
template <int kLanes>
struct Node;

template <>
struct Node<4> {
  typedef int64_t Keys __attribute__((vector_size(4 * sizeof(int64_t))));
  typedef int64_t Half __attribute__((vector_size(2 * sizeof(int64_t))));

  static DPQ_INLINE int64_t count(const int64_t* keys, int64_t id) {
    Keys counts = Keys{};
    for (int64_t k = 0; k < kNode; k += 4) {
      Keys piece;
      std::memcpy(&piece, keys + k, sizeof(piece));
      counts -= piece <= id;
    }
    Half halves[2];  // added up in registers: lane by lane through memory takes longer than the comparisons
    std::memcpy(halves, &counts, sizeof(counts));
    const Half sums = halves[0] + halves[1];
    return sums[0] + sums[1];
  }
};

#ifdef DPQ_HAS_LANES
// With AVX-512 a comparison gives a bit for each lane. No vector expression leads there, and intrinsics would have to
// stand in a function of their instruction set, which is not inlined into the templates around it: so it is assembly.
template <>
struct Node<8> {
  typedef int64_t Keys __attribute__((vector_size(8 * sizeof(int64_t))));

  // Bit k: keys[k] is not above the id.
  static DPQ_INLINE uint32_t not_above(const int64_t* keys, int64_t id) {
    const Keys ids = id - Keys{};
    Keys piece;
    std::memcpy(&piece, keys, sizeof(piece));
    uint8_t bits;
    asm("vpcmpnltq %2, %1, %0" : "=k"(bits) : "v"(ids), "vm"(piece));
    return bits;
  }

  static DPQ_INLINE int64_t count(const int64_t* keys, int64_t id) {
    return __builtin_popcount(not_above(keys, id) | not_above(keys + kLineKeys, id) << kLineKeys);
  }
};
#endif

// The baseline has no comparison of 64-bit integers in vectors: four halvings are faster than 16 comparisons.
template <>
struct Node<2> {
  static DPQ_INLINE int64_t count(const int64_t* keys, int64_t id) {
    int64_t count = 0;
    for (int64_t half = kNode / 2; half > 0; half /= 2) count += (load(keys + count + half - 1) <= id) * half;
    return count + (load(keys + count) <= id);
  }
};

DPQ_INLINE void prefetch_node(const int64_t* keys) {
  __builtin_prefetch(keys);
  __builtin_prefetch(keys + kLineKeys);
}

// The row of an id that is ids[at] if it is anywhere.
DPQ_INLINE int64_t row_at(const FindArgs& a, int64_t at, int64_t id) {
  return load(a.ids + at) == id ? static_cast<int64_t>(load(a.rows + at)) : kMissingRow;
}

// From the root to the leaves, for up to kTogether ids at a time. Where a node lies follows from the number of ids, so
// keys that are damaged lead to a wrong leaf and never outside.
template <int kLanes>
DPQ_INLINE void descend(const FindArgs& a, const int64_t* asked, int64_t num_asked, int64_t* at) {
  std::fill_n(at, num_asked, 0);
  for (int64_t l = 0; l < a.num_levels; ++l) {
    const Level level = a.levels[l];
    const int64_t* below = l + 1 == a.num_levels ? a.ids : a.levels[l + 1].keys;
    for (int64_t n = 0; n < num_asked; ++n) {
      const int64_t count = Node<kLanes>::count(level.keys + at[n], asked[n]);
      at[n] = std::min(at[n] + count - (count > 0), level.num_keys - 1) * kNode;
      prefetch_node(below + at[n]);
    }
  }
}

// Whether the leaf at `start`, `count` of whose ids are not above the one asked for, is where it must be.
DPQ_INLINE bool is_right_leaf(const FindArgs& a, int64_t start, int64_t count, int64_t id) {
  if (count == 0) return start == 0;
  const int64_t after = start + kNode;
  return count < kNode || after >= a.num_ids || load(a.ids + after - 1) == id || load(a.ids + after) > id;
}

template <int kLanes>
DPQ_INLINE void find_by_tree(const FindArgs& a) {
  int64_t at[kTogether];
  for (int64_t first = 0; first < a.num_asked; first += kTogether) {
    const int64_t* asked = a.asked + first;
    const int64_t num_asked = std::min(kTogether, a.num_asked - first);
    descend<kLanes>(a, asked, num_asked, at);
    for (int64_t n = 0; n < num_asked; ++n) {
      const int64_t leaf = std::min(at[n], a.num_ids - kNode);  // the last one reaches back to be whole
      const int64_t count = Node<kLanes>::count(a.ids + leaf, asked[n]);
      if (!is_right_leaf(a, leaf, count, asked[n])) {
        *a.bad_at = first + n;
        return;
      }
      at[n] = leaf + count - (count > 0);
      __builtin_prefetch(a.rows + at[n]);
    }
    for (int64_t n = 0; n < num_asked; ++n) a.out[first + n] = row_at(a, at[n], asked[n]);
  }
}

// Without a tree. Every search halves the same number of ids, so all stand at the same step.
DPQ_INLINE void find_by_halving(const FindArgs& a) {
  for (int64_t first = 0; first < a.num_asked; first += kTogether) {
    const int64_t* asked = a.asked + first;
    const int64_t num_asked = std::min(kTogether, a.num_asked - first);
    int64_t at[kTogether] = {};
    for (int64_t left = a.num_ids; left > 1;) {
      const int64_t half = left / 2;
      const int64_t next_half = (left - half) / 2;
      for (int64_t n = 0; n < num_asked; ++n) {
        at[n] += (load(a.ids + at[n] + half) <= asked[n]) * half;
        __builtin_prefetch(a.ids + at[n] + next_half);
      }
      left -= half;
    }
    for (int64_t n = 0; n < num_asked; ++n) __builtin_prefetch(a.rows + at[n]);
    for (int64_t n = 0; n < num_asked; ++n) a.out[first + n] = row_at(a, at[n], asked[n]);
  }
}

template <int kFloatLanes>
DPQ_INLINE void find_loop(const FindArgs& a) {
  if (a.num_ids == 0) {
    std::fill_n(a.out, a.num_asked, kMissingRow);
  } else if (a.num_levels == 0) {
    find_by_halving(a);
  } else {
    find_by_tree<kFloatLanes / 2>(a);
  }
}

DPQ_DEFINE_BY_LANES(find_all, find_loop, FindArgs)

// The levels of a tree over num_ids ids, the root first. Each has a key for every kNode of the level below.
std::vector<Level> levels_of(const int64_t* tree, int64_t num_ids) {
  std::vector<Level> levels;
  for (int64_t num_keys = num_ids; num_keys > kNode;) {
    num_keys = (num_keys + kNode - 1) / kNode;
    levels.insert(levels.begin(), Level{nullptr, num_keys});
  }
  for (Level& level : levels) {
    level.keys = tree;
    tree += (level.num_keys + kNode - 1) / kNode * kNode;
  }
  return levels;
}

// Returns the position of the first id that the tree led astray, -1 where there is none.
int64_t find_integer_rows(const dpq::Integers& known, dpq::Array<const int64_t, 1> asked,
                          dpq::Array<int64_t, 1> out) {
  dpq::check_shape("out", out, {dpq::size_of(asked)});
  nb::gil_scoped_release release;
  return known.find(asked.data(), static_cast<int64_t>(asked.shape(0)), out.data());
}

}  // namespace

namespace dpq {

Integers::Integers(Array<const int64_t, 1> ids, Array<const uint32_t, 1> rows,
                   std::optional<Array<const int64_t, 1>> tree)
    : ids_(std::move(ids)), rows_(std::move(rows)), tree_(std::move(tree)) {
  check_shape("rows", rows_, {size_of(ids_)});
  if (!tree_) return;
  levels_ = levels_of(tree_->data(), size_of(ids_));
  int64_t num_keys = 0;
  for (const Level& level : levels_) num_keys += (level.num_keys + kNode - 1) / kNode * kNode;
  check_shape("tree", *tree_, {num_keys});
}

int64_t Integers::find(const int64_t* asked, int64_t num_asked, int64_t* out) const {
  int64_t bad_at = kNone;
  find_all(FindArgs{asked, ids_.data(), rows_.data(), levels_.data(), out, &bad_at, num_asked,
                    static_cast<int64_t>(ids_.shape(0)), static_cast<int64_t>(levels_.size())});
  return bad_at;
}

}  // namespace dpq

void define_find_integers(nb::module_& m) {
  nb::class_<dpq::Integers>(m, "Integers")
      .def(nb::init<dpq::Array<const int64_t, 1>, dpq::Array<const uint32_t, 1>,
                    std::optional<dpq::Array<const int64_t, 1>>>(),
           dpq::array("ids"), dpq::array("rows"), dpq::array("tree").none());
  m.def("find_integer_rows", &find_integer_rows, nb::arg("known"), dpq::array("ids"), dpq::array("out"));
}
