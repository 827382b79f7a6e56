// Ids to vectors or to packed codes, in one go: a row's codes are on their way from memory while the next ids are
// searched. Its plain twin is find_integer_rows and decode, or copy_codes, of tests/references.py.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "find_integers.h"
#include "source.h"
#include "threads.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kIdsOfPiece = 128;  // found before the piece before them is written
constexpr int64_t kIdBytes = sizeof(int64_t), kPositionBytes = sizeof(uint32_t);

// What came of some ids.
struct Found {
  int64_t num_missing = 0;
  int64_t bad_id_at = -1;  // position of the first id that the tree led astray
  dpq::Damage damage;

  bool is_bad() const { return bad_id_at >= 0 || damage.any(); }
};

// Finds the rows of ids begin .. end - 1, piece by piece; write(begin, end), which says what is damaged, gets each piece
// when the rows of the next have been found.
template <typename Write>
Found find_and_write(const dpq::Integers& known, const dpq::Source& source, const int64_t* ids, int64_t* rows,
                     int64_t begin, int64_t end, const Write& write) {
  Found found;
  const auto find_piece = [&](int64_t from) {
    const int64_t to = std::min(from + kIdsOfPiece, end);
    const int64_t bad_at = known.find(ids + from, to - from, rows + from);
    if (bad_at >= 0) {
      found.bad_id_at = from + bad_at;
      return to;
    }
    for (int64_t n = from; n < to; ++n) {
      found.num_missing += rows[n] == dpq::kMissingRow;
      if (rows[n] >= 0 && rows[n] < source.num_rows) dpq::prefetch_row(source, rows[n]);
    }
    return to;
  };
  for (int64_t found_to = find_piece(begin); begin < end && !found.is_bad();) {
    const int64_t next = find_piece(found_to);
    found.damage = write(begin, found_to);
    begin = found_to;
    found_to = next;
  }
  return found;
}

// Packed codes of rows begin .. end - 1, zeros behind those of a tier of fewer levels and where a row is missing; and the
// tier of each row, if wanted.
dpq::Damage write_codes(const dpq::Source& source, const int64_t* rows, int64_t begin, int64_t end, uint8_t* packed,
                        uint8_t* tiers) {
  const int64_t width = source.max_row_bytes;
  dpq::Damage damage;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = rows[n];
    uint8_t* const to = packed + n * width;
    if (row == dpq::kMissingRow) {
      std::memset(to, 0, width);
      if (tiers != nullptr) tiers[n] = 0;
      continue;
    }
    if (row < 0 || row >= source.num_rows) {
      damage.bad_row_at = n;
      return damage;
    }
    const dpq::Tier& tier = dpq::tier_of(source, row);
    std::memcpy(to, dpq::packed_at(tier, row), tier.row_bytes);
    std::memset(to + tier.row_bytes, 0, width - tier.row_bytes);
    if (tiers != nullptr) tiers[n] = static_cast<uint8_t>(&tier - source.tiers);
  }
  return damage;
}

// Returns how many ids have no row, the position of the first that was led astray, and what `decode` returns.
nb::tuple lookup_integers(const dpq::Integers& known, const dpq::Vectors& vectors, dpq::Array<const int64_t, 1> ids,
                          dpq::Array<int64_t, 1> rows, dpq::Out out, int64_t num_threads) {
  const dpq::Source& source = vectors.source();
  const int64_t num_ids = dpq::size_of(ids);
  dpq::check_threads(num_threads);
  dpq::check_shape("rows", rows, {num_ids});
  dpq::check_out(out, num_ids, source.dim);
  const auto decode = [&](int64_t begin, int64_t end) {
    return dpq::decode_rows(source, rows.data(), begin, end, end, out.data(), dpq::is_half(out));
  };
  const auto find = [&](int64_t begin, int64_t end) {
    return find_and_write(known, source, ids.data(), rows.data(), begin, end, decode);
  };
  Found all;
  for (const Found& part : dpq::in_parts(num_ids, num_threads, dpq::kItemsOfPart, find)) {
    if (!all.is_bad()) {
      all.bad_id_at = part.bad_id_at;
      all.damage = part.damage;
    }
    all.num_missing += part.num_missing;
  }
  return nb::make_tuple(all.num_missing, all.bad_id_at, all.damage.bad_row_at, all.damage.bad_code_at);
}

// A tier's number travels as a byte.
void check_has_codes(const dpq::Source& source) {
  if (source.tiers == nullptr) dpq::refuse("vectors", "dense ones", "codes");
  dpq::check_range("tiers", source.num_tiers, 1, 256);
}

// Returns what `decode` returns.
nb::tuple copy_codes(const dpq::Vectors& vectors, dpq::Array<const int64_t, 1> rows, dpq::Array<uint8_t, 2> packed,
                     std::optional<dpq::Array<uint8_t, 1>> tiers) {
  check_has_codes(vectors.source());
  dpq::check_shape("packed", packed, {dpq::size_of(rows), vectors.source().max_row_bytes});
  if (tiers) dpq::check_shape("tiers", *tiers, {dpq::size_of(rows)});
  dpq::Damage damage;
  {
    nb::gil_scoped_release release;
    damage = write_codes(vectors.source(), rows.data(), 0, static_cast<int64_t>(rows.shape(0)), packed.data(),
                         tiers ? tiers->data() : nullptr);
  }
  return nb::make_tuple(damage.bad_row_at, damage.bad_code_at);
}

// Ids as bytes to a reply: rows, then the positions of missing ids, then, of codes with tiers, the tier of each row; all
// as this machine has its numbers. number_bytes is 4 or 2, of a vector's number, or 0 for packed codes. Returns the
// reply, of which nothing holds where something is damaged, and what lookup_integers does.
nb::tuple lookup_bytes(const dpq::Integers& known, const dpq::Vectors& vectors, nb::bytes asked, int64_t number_bytes) {
  const dpq::Source& source = vectors.source();
  if (asked.size() % kIdBytes != 0) dpq::refuse("ids", std::to_string(asked.size()) + " bytes", "a multiple of 8");
  const int64_t num_ids = static_cast<int64_t>(asked.size()) / kIdBytes;
  const bool are_codes = number_bytes == 0;
  if (are_codes) check_has_codes(source);
  if (!are_codes && number_bytes != 2 && number_bytes != 4) {
    dpq::refuse("number_bytes", std::to_string(number_bytes), "0, 2 or 4");
  }
  const bool have_tiers = are_codes && source.num_tiers > 1;
  const int64_t rows_bytes = num_ids * (are_codes ? source.max_row_bytes : number_bytes * source.dim);
  const int64_t tiers_bytes = have_tiers ? num_ids : 0;
  std::vector<int64_t> ids(num_ids), rows(num_ids);
  std::vector<uint8_t> tiers(tiers_bytes);
  std::memcpy(ids.data(), asked.c_str(), num_ids * kIdBytes);
  PyObject* reply = PyBytes_FromStringAndSize(nullptr, rows_bytes + tiers_bytes);
  if (reply == nullptr) throw nb::python_error();
  Found found;
  {
    nb::gil_scoped_release release;
    void* const out = PyBytes_AS_STRING(reply);
    found = find_and_write(known, source, ids.data(), rows.data(), 0, num_ids, [&](int64_t begin, int64_t end) {
      if (!are_codes) return dpq::decode_rows(source, rows.data(), begin, end, end, out, number_bytes == 2);
      return write_codes(source, rows.data(), begin, end, static_cast<uint8_t*>(out),
                         have_tiers ? tiers.data() : nullptr);
    });
  }
  const int64_t missing_bytes = found.is_bad() ? 0 : found.num_missing * kPositionBytes;
  if (missing_bytes > 0) {
    if (_PyBytes_Resize(&reply, rows_bytes + missing_bytes + tiers_bytes) != 0) throw nb::python_error();
    char* to = PyBytes_AS_STRING(reply) + rows_bytes;
    for (int64_t n = 0; n < num_ids; ++n) {
      if (rows[n] != dpq::kMissingRow) continue;
      const uint32_t position = static_cast<uint32_t>(n);
      std::memcpy(to, &position, kPositionBytes);
      to += kPositionBytes;
    }
  }
  if (have_tiers) std::memcpy(PyBytes_AS_STRING(reply) + rows_bytes + missing_bytes, tiers.data(), tiers_bytes);
  return nb::make_tuple(nb::steal<nb::bytes>(reply), found.num_missing, found.bad_id_at, found.damage.bad_row_at,
                        found.damage.bad_code_at);
}

}  // namespace

void define_lookup(nb::module_& m) {
  m.def("copy_codes", &copy_codes, nb::arg("vectors"), dpq::array("rows"), dpq::array("packed"),
        dpq::array("tiers").none());
  m.def("lookup_bytes", &lookup_bytes, nb::arg("known"), nb::arg("vectors"), nb::arg("ids"), nb::arg("number_bytes"));
  m.def("lookup_integers", &lookup_integers, nb::arg("known"), nb::arg("vectors"), dpq::array("ids"),
        dpq::array("rows"), dpq::array("out"), nb::arg("num_threads"));
}
