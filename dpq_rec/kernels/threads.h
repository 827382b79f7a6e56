// Work in parts, on threads that live as long as the process.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace dpq {

constexpr int64_t kItemsOfPart = 1024;  // some 15 microseconds of work

// Calls run(part) for each part, on this thread and on up to num_threads - 1 others; returns when all is done. Each
// takes the next part that nobody has, so that a thread that is held up delays no more than the part it has.
void run_parts(int64_t num_parts, int64_t num_threads, const std::function<void(int64_t)>& run);

// What work(begin, end) returns for each part of the items from 0 to num_items - 1, in order; without the GIL. One
// thread takes them all as one part.
template <typename Work>
auto in_parts(int64_t num_items, int64_t num_threads, int64_t items_of_part, const Work& work) {
  if (num_threads <= 1) items_of_part = std::max<int64_t>(num_items, 1);
  std::vector<decltype(work(0, 0))> results((num_items + items_of_part - 1) / items_of_part);
  const nanobind::gil_scoped_release release;
  run_parts(static_cast<int64_t>(results.size()), num_threads, [&](int64_t part) {
    const int64_t begin = part * items_of_part;
    results[part] = work(begin, std::min(begin + items_of_part, num_items));
  });
  return results;
}

}  // namespace dpq
