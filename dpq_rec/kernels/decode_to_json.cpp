// Rows to the JSON of their vectors. A vector's text is that of its groups, side by side, and there are only as many
// different ones as there are values: they are written beforehand, and copied here. Its plain twin is decode_to_json in
// tests/references.py, which the tests hold it to.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"
#include "source.h"
#include "vectors.h"

namespace nb = nanobind;

namespace {

// Texts are copied in whole blocks, as many as the longest one needs: what is too much is overwritten by the next.
// Wider registers would spare a fifth of the loop, which is an eighth of a request: that is not worth a version each.
constexpr int64_t kBlockBytes = 32;

class JsonTexts {
 public:
  // Texts of all groups, one behind the other, each with a comma at its end, and none for codes that there are not; where
  // each ends; that of a missing row.
  JsonTexts(const nb::bytes& groups, dpq::Array<const uint32_t, 1> ends, const nb::bytes& zeros)
      : groups_(groups.c_str(), groups.c_str() + groups.size()),
        begins_{0},
        zeros_(zeros.c_str(), zeros.c_str() + zeros.size()) {
    begins_.insert(begins_.end(), ends.data(), ends.data() + ends.size());
    for (size_t g = 1; g < begins_.size(); ++g) {
      dpq::check_range("ends", begins_[g], begins_[g - 1], static_cast<int64_t>(groups.size()));
      longest_ = std::max<int64_t>(longest_, begins_[g] - begins_[g - 1]);
    }
    groups_.resize(groups.size() + copied_bytes());
  }

  int64_t num_groups() const { return static_cast<int64_t>(begins_.size()) - 1; }
  const char* groups() const { return groups_.data(); }
  const uint32_t* begins() const { return begins_.data(); }  // of each group, and behind the last
  const std::vector<char>& zeros() const { return zeros_; }
  // Of a text at a time, and of what comes with it.
  int64_t copied_bytes() const { return (longest_ + kBlockBytes - 1) / kBlockBytes * kBlockBytes; }
  // Of a row.
  int64_t most_bytes(int64_t num_subspaces) const {
    return std::max<int64_t>(num_subspaces * longest_ + 2, static_cast<int64_t>(zeros_.size()));
  }

 private:
  std::vector<char> groups_;
  std::vector<uint32_t> begins_;
  std::vector<char> zeros_;
  int64_t longest_ = 0;
};

// Takes the codes of each row to "[1.5,-0.25],".
struct Write {
  const char* const groups;
  const uint32_t* const begins;
  const std::vector<char>& zeros;
  const int64_t num_subspaces;
  const int64_t stride;  // groups from a subspace's first to the next one's: 0 where they share them
  const int64_t copied_bytes;
  char* out;

  DPQ_INLINE void at(int64_t) {}
  DPQ_INLINE void missing(int64_t) { out = std::copy(zeros.begin(), zeros.end(), out); }
  template <typename Codes>
  DPQ_INLINE void put(const Codes& codes) {
    char* to = out;
    *to++ = '[';
    for (int64_t j = 0; j < num_subspaces; ++j) {
      const uint32_t* begin = begins + j * stride + codes[j];
      const char* from = groups + begin[0];
      for (int64_t at = 0; at < copied_bytes; at += kBlockBytes) std::memcpy(to + at, from + at, kBlockBytes);
      to += begin[1] - begin[0];
    }
    to[-1] = ']';
    *to++ = ',';
    out = to;
  }
};

// Writes from `out` on, and moves it to the end.
dpq::Damage write_rows(const dpq::Source& source, const JsonTexts& texts, const int64_t* rows, int64_t num_lookups,
                       char*& out) {
  std::vector<uint8_t> tail(dpq::tail_bytes(source));
  const int64_t stride = source.shared ? 0 : source.num_codes;
  Write write{texts.groups(), texts.begins(), texts.zeros(), source.num_subspaces, stride, texts.copied_bytes(), out};
  dpq::Damage damage;
  dpq::with_codes<dpq::kNoPiece, true>(source, tail.data(), [&](const auto& vectors) DPQ_INLINE_LAMBDA {
    damage = dpq::walk(vectors, rows, 0, num_lookups, num_lookups, write);
  });
  out = write.out;
  return damage;
}

// The texts are those of the values of one level; of codes that there are not, too, see vectors.h.
void check_texts(const dpq::Source& source, const JsonTexts& texts) {
  if (source.tiers == nullptr || source.max_levels > 1) dpq::refuse("vectors", "others", "codes of one level");
  const int64_t num_tables = source.shared ? 1 : source.num_subspaces;
  const int64_t num_groups = (num_tables - 1) * source.num_codes + (int64_t{1} << source.code_bits);
  if (texts.num_groups() != num_groups) {
    dpq::refuse("texts", std::to_string(texts.num_groups()), std::to_string(num_groups) + ", those of the vectors");
  }
}

char* append(const nb::bytes& text, char* out) { return std::copy_n(text.c_str(), text.size(), out); }

// before + "[1.5,-0.25],[0.0,0.0]" + after, and what is damaged; then the text is worth nothing.
nb::tuple decode_to_json(const dpq::Vectors& vectors, const JsonTexts& texts, dpq::Array<const int64_t, 1> rows,
                         const nb::bytes& before, const nb::bytes& after) {
  const dpq::Source& source = vectors.source();
  check_texts(source, texts);
  const int64_t num_lookups = static_cast<int64_t>(rows.shape(0));
  const int64_t most_bytes = num_lookups * texts.most_bytes(source.num_subspaces) + texts.copied_bytes();
  PyObject* text = PyBytes_FromStringAndSize(nullptr, most_bytes + before.size() + after.size());
  if (text == nullptr) nb::raise_python_error();
  char* const begin = PyBytes_AS_STRING(text);
  char* const first = append(before, begin);
  char* end = first;
  dpq::Damage damage;
  {
    nb::gil_scoped_release release;
    damage = write_rows(source, texts, rows.data(), num_lookups, end);
  }
  if (end > first) --end;  // without the comma behind the last row
  end = append(after, end);
  if (_PyBytes_Resize(&text, end - begin) != 0) nb::raise_python_error();
  return nb::make_tuple(nb::steal<nb::bytes>(text), dpq::first_of({damage}));
}

}  // namespace

void define_decode_to_json(nb::module_& m) {
  nb::class_<JsonTexts>(m, "JsonTexts")
      .def(nb::init<const nb::bytes&, dpq::Array<const uint32_t, 1>, const nb::bytes&>(), nb::arg("groups"),
           dpq::array("ends"), nb::arg("zeros"));
  m.def("decode_to_json", &decode_to_json, nb::arg("vectors"), nb::arg("texts"), dpq::array("rows"), nb::arg("before"),
        nb::arg("after"));
}
