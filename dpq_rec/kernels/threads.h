// Work in parts, on threads that live as long as the process.
#pragma once

#include <cstdint>
#include <functional>

namespace dpq {

// Calls work(part) for each part, on this thread and on up to num_threads - 1 others; returns when all is done. Each
// takes the next part that nobody has, so that a thread that is held up delays no more than the part it has.
void in_parts(int64_t num_parts, int64_t num_threads, const std::function<void(int64_t)>& work);

}  // namespace dpq
