// A sorted list of integers, and the row of each.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "arrays.h"

namespace dpq {

// The ids that begin the nodes of the level below, or the leaves; filled up to whole nodes.
struct Level {
  const int64_t* keys;
  int64_t num_keys;  // without the filling
};

class Integers {
 public:
  // ids ascend; rows are as many; the tree is their id_tree (id_index.py), if there is one.
  Integers(Array<const int64_t, 1> ids, Array<const uint32_t, 1> rows, std::optional<Array<const int64_t, 1>> tree);

  Integers(const Integers&) = delete;
  Integers& operator=(const Integers&) = delete;

  // Rows of asked[0] .. asked[num_asked - 1]; returns the position of the first that the tree led astray, or -1.
  int64_t find(const int64_t* asked, int64_t num_asked, int64_t* out) const;

 private:
  Array<const int64_t, 1> ids_;
  Array<const uint32_t, 1> rows_;
  std::optional<Array<const int64_t, 1>> tree_;
  std::vector<Level> levels_;  // the root first
};

}  // namespace dpq
