// Arrays as Python hands them over, and what is looked at before any is read or written: a function checks its own, so
// that no caller can make it leave them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

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

// An argument that is an array of the very type: converted, it would be a copy, and what is written to one is lost.
inline auto array(const char* name) { return nanobind::arg(name).noconvert(); }

// A ValueError in Python.
[[noreturn]] inline void refuse(const std::string& what, const std::string& got, const std::string& wanted) {
  throw std::invalid_argument(what + ": got " + got + ", want " + wanted);
}

inline std::string shown(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  return text + "]";
}

template <typename A>
int64_t size_of(const A& array, size_t axis = 0) {
  return static_cast<int64_t>(array.shape(axis));
}

template <typename A>
void check_shape(const char* what, const A& array, std::initializer_list<int64_t> wanted) {
  std::string got;
  size_t axis = 0;
  bool fits = true;
  for (const int64_t size : wanted) fits &= size_of(array, axis++) == size;
  if (fits) return;
  for (axis = 0; axis < array.ndim(); ++axis) got += (axis ? ", " : "[") + std::to_string(size_of(array, axis));
  refuse(what, got + "]", shown(wanted));
}

inline void check_range(const char* what, int64_t got, int64_t least, int64_t most) {
  if (got < least || got > most) refuse(what, std::to_string(got), std::to_string(least) + " to " + std::to_string(most));
}

// Codes that are filled up to whole vector registers.
inline void check_padded_codes(int64_t padded_codes) {
  check_range("codes", padded_codes, kMaxLanes, int64_t{1} << 16);
  if (padded_codes % kMaxLanes != 0) refuse("codes", std::to_string(padded_codes), "a multiple of LANES");
}

constexpr int64_t kMostThreads = INT32_MAX;  // that may be asked for; threads.cpp makes fewer

inline void check_threads(int64_t num_threads) { check_range("num_threads", num_threads, 1, kMostThreads); }

}  // namespace dpq
