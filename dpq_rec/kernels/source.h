// Where the vectors of rows lie, as Python hands it over.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "arrays.h"
#include "vectors.h"

namespace dpq {

// A Source, and the arrays that it points into.
class Vectors {
 public:
  explicit Vectors(Array<const float, 2> dense) : dense_(std::move(dense)) {
    source_.vectors = dense_.data();
    source_.num_rows = static_cast<int64_t>(dense_.shape(0));
    source_.dim = static_cast<int64_t>(dense_.shape(1));
  }

  using Packed = std::vector<std::pair<Array<const uint8_t, 2>, int64_t>>;

  // Packed codes and levels of each tier, in the order of rows.
  Vectors(Packed packed, Array<const float, 3> values, int64_t num_subspaces, int64_t code_bits, bool shared)
      : packed_(std::move(packed)), values_(std::move(values)) {
    point_into_arrays(num_subspaces, code_bits, shared);
  }

  // Other codes of the same values.
  Vectors(const Vectors& others, Packed packed)
      : packed_(std::move(packed)), values_(others.values_), padded_(others.padded_) {
    if (others.source_.tiers == nullptr) refuse("vectors", "dense ones", "codes");
    point_into_arrays(others.source_.num_subspaces, others.source_.code_bits, others.source_.shared);
  }

  Vectors(const Vectors&) = delete;
  Vectors& operator=(const Vectors&) = delete;

  const Source& source() const { return source_; }
  int64_t dim() const { return source_.dim; }

 private:
  void point_into_arrays(int64_t num_subspaces, int64_t code_bits, bool shared) {
    check_codes(num_subspaces, code_bits, shared);
    int64_t first_row = 0;
    for (const auto& [codes, num_levels] : packed_) {
      const int64_t end_row = first_row + size_of(codes);
      tiers_.push_back(Tier{codes.data(), first_row, end_row, size_of(codes, 1), num_levels});
      source_.max_row_bytes = std::max(source_.max_row_bytes, tiers_.back().row_bytes);
      source_.max_levels = std::max(source_.max_levels, num_levels);
      first_row = end_row;
    }
    source_.tiers = tiers_.data();
    source_.num_tiers = static_cast<int64_t>(tiers_.size());
    source_.values = values_up_to(int64_t{1} << code_bits);
    source_.num_rows = first_row;
    source_.num_subspaces = num_subspaces;
    source_.num_codes = size_of(values_, 1);
    source_.subspace_dim = size_of(values_, 2);
    source_.dim = num_subspaces * source_.subspace_dim;
    source_.code_bits = code_bits;
    source_.shared = shared;
  }

  // The arrays have the sizes that a walk over rows trusts.
  void check_codes(int64_t num_subspaces, int64_t code_bits, bool shared) const {
    check_range("code_bits", code_bits, 1, kMostCodeBits);
    check_range("num_codes", size_of(values_, 1), 1, int64_t{1} << code_bits);
    check_range("num_subspaces", num_subspaces, 1, INT32_MAX);
    if (packed_.empty()) refuse("packed", "no tier", "one or more");
    for (const auto& [codes, num_levels] : packed_) {
      check_range("num_levels", num_levels, 1, packed_.front().second);
      check_shape("packed", codes, {size_of(codes), (num_levels * num_subspaces * code_bits + 7) / 8});
    }
    const int64_t num_levels = packed_.front().second;
    check_shape("values", values_,
                {shared ? num_levels : num_levels * num_subspaces, size_of(values_, 1), size_of(values_, 2)});
  }

  // Values behind which those of codes that there are not can be read: codes lie in a file, and may change between the
  // look at them and their use.
  const float* values_up_to(int64_t num_codes) {
    const int64_t num_beyond = (num_codes - size_of(values_, 1)) * size_of(values_, 2);
    if (num_beyond == 0) return values_.data();
    if (!padded_) {
      padded_ = std::make_shared<std::vector<float>>(values_.size() + num_beyond);
      std::copy_n(values_.data(), values_.size(), padded_->data());
    }
    return padded_->data();
  }

  static constexpr int64_t kMostCodeBits = 16;

  Array<const float, 2> dense_;
  Packed packed_;
  Array<const float, 3> values_;
  std::shared_ptr<std::vector<float>> padded_;  // values and zeros, where there are fewer codes than their bits can name
  std::vector<Tier> tiers_;
  Source source_{};
};

// Vectors [N, E] to be written, in either type.
using Out = nanobind::ndarray<nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;
inline bool is_half(const Out& out) { return out.dtype().bits == 16; }

inline void check_out(const Out& out, int64_t num_vectors, int64_t dim) {
  const bool is_float = out.dtype().code == static_cast<uint8_t>(nanobind::dlpack::dtype_code::Float);
  if (!is_float || (out.dtype().bits != 32 && !is_half(out))) refuse("dtype", "another", "float32 or float16");
  check_shape("out", out, {num_vectors, dim});
}

// Vectors of rows[begin] .. rows[end - 1] to the same places of `out`, float or half [num_rows, E]; rows up to `last` may
// be asked from memory. Defined in decode.cpp.
Damage decode_rows(const Source& source, const int64_t* rows, int64_t begin, int64_t end, int64_t last, void* out,
                   bool half);

// (position of the first bad row, position of the first bad code), -1 where there is none; of several parts of the work,
// in order, the first damage.
inline nanobind::tuple first_of(const std::vector<Damage>& parts) {
  for (const Damage& damage : parts) {
    if (damage.any()) return nanobind::make_tuple(damage.bad_row_at, damage.bad_code_at);
  }
  return nanobind::make_tuple(-1, -1);
}

}  // namespace dpq
