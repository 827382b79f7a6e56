// Arrays as Python hands them over.
#pragma once

#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace dpq {

template <typename T, int kDims>
using Array = nanobind::ndarray<T, nanobind::ndim<kDims>, nanobind::c_contig, nanobind::device::cpu>;

constexpr int64_t kMissingRow = -1;  // of an id that has none

// What a file holds may be aligned to nothing.
template <typename T>
DPQ_INLINE T load(const T* from) {
  T to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

}  // namespace dpq
