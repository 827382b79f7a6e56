// Strings to rows. Its plain twin is find_rows in reference.py, which the tests hold it to.
// Lengths of the arrays are trusted to fit each other; the offsets come from a file, and each is checked as it is read.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace nb = nanobind;

namespace {

constexpr int64_t kMissingRow = -1;
constexpr int64_t kNone = -1;
constexpr int64_t kTogether = 32;  // ids searched in step, so that their cache misses overlap

template <typename T>
using Array = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

struct Text {
  const char* begin;
  int64_t size;
};

// What a file holds may be aligned to nothing.
template <typename T>
T load(const T* from) {
  T to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// Whether a <= b in the order of bytes, which for UTF-8 is the order of code points.
bool is_not_above(Text a, Text b) {
  const int order = std::memcmp(a.begin, b.begin, std::min(a.size, b.size));
  return order != 0 ? order < 0 : a.size <= b.size;
}

bool is_equal(Text a, Text b) { return a.size == b.size && std::memcmp(a.begin, b.begin, a.size) == 0; }

// The sorted ids of a vocabulary: entry i is bytes[offsets[i]] .. bytes[offsets[i + 1] - 1].
struct Entries {
  const char* bytes;
  const int64_t* offsets;  // [num_entries + 1]
  const uint32_t* rows;    // [num_entries]
  int64_t num_bytes, num_entries;

  // False where the offsets lie outside the bytes: then nothing may be read.
  bool text(int64_t entry, Text* out) const {
    const int64_t begin = load(offsets + entry), end = load(offsets + entry + 1);
    if (begin < 0 || end < begin || end > num_bytes) return false;
    *out = Text{bytes + begin, end - begin};
    return true;
  }
  void prefetch_offsets(int64_t entry) const { __builtin_prefetch(offsets + entry); }
  void prefetch_text(int64_t entry) const {
    const int64_t begin = load(offsets + entry);
    if (begin >= 0 && begin < num_bytes) __builtin_prefetch(bytes + begin);
  }
};

// Rows of up to kTogether ids; returns an entry whose offsets are damaged, or kNone. Every search halves the same number
// of entries, so all stand at the same step: first the offsets of all are asked from memory, then the texts.
int64_t search_together(const Entries& e, const Text* ids, int64_t num_ids, int64_t* rows) {
  int64_t at[kTogether] = {};  // the last entry known not to be above the id, or the first one
  Text text;
  for (int64_t left = e.num_entries; left > 1;) {
    const int64_t half = left / 2;
    for (int64_t n = 0; n < num_ids; ++n) e.prefetch_offsets(at[n] + half);
    for (int64_t n = 0; n < num_ids; ++n) e.prefetch_text(at[n] + half);
    for (int64_t n = 0; n < num_ids; ++n) {
      if (!e.text(at[n] + half, &text)) return at[n] + half;
      at[n] += is_not_above(text, ids[n]) * half;
    }
    left -= half;
  }
  for (int64_t n = 0; n < num_ids; ++n) {
    if (!e.text(at[n], &text)) return at[n];
    rows[n] = is_equal(text, ids[n]) ? load(e.rows + at[n]) : kMissingRow;
  }
  return kNone;
}

Entries entries_of(const Array<const uint8_t>& bytes, const Array<const int64_t>& offsets, const uint32_t* rows) {
  return Entries{reinterpret_cast<const char*>(bytes.data()), offsets.data(), rows,
                 static_cast<int64_t>(bytes.shape(0)), static_cast<int64_t>(offsets.shape(0)) - 1};
}

// The UTF-8 of Python strings, in place; returns the position of the first one that has none, or kNone.
int64_t view_texts(nb::tuple ids, std::vector<Text>* texts) {
  texts->reserve(ids.size());
  for (size_t n = 0; n < ids.size(); ++n) {
    PyObject* id = PyTuple_GET_ITEM(ids.ptr(), n);
    Py_ssize_t size = 0;
    const char* begin = PyUnicode_Check(id) ? PyUnicode_AsUTF8AndSize(id, &size) : nullptr;
    if (begin == nullptr) {
      if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw nb::python_error();
      PyErr_Clear();
      return static_cast<int64_t>(n);
    }
    texts->push_back(Text{begin, size});
  }
  return kNone;
}

// Returns (position of the first id that is no UTF-8 text, a damaged entry), -1 where there is none. `ids` is a tuple:
// it keeps its strings, whatever other threads do, while the GIL is released.
nb::tuple find_rows(nb::tuple ids, Array<const uint8_t> bytes, Array<const int64_t> offsets, Array<const uint32_t> rows,
                    Array<int64_t> out) {
  std::vector<Text> texts;
  const int64_t bad_id_at = view_texts(ids, &texts);
  if (bad_id_at != kNone) return nb::make_tuple(bad_id_at, kNone);
  const Entries entries = entries_of(bytes, offsets, rows.data());
  const int64_t num_ids = static_cast<int64_t>(texts.size());
  int64_t bad_entry = kNone;
  {
    nb::gil_scoped_release release;
    if (entries.num_entries == 0) std::fill_n(out.data(), num_ids, kMissingRow);
    for (int64_t n = 0; n < num_ids && entries.num_entries != 0 && bad_entry == kNone; n += kTogether) {
      bad_entry = search_together(entries, texts.data() + n, std::min(kTogether, num_ids - n), out.data() + n);
    }
  }
  return nb::make_tuple(kNone, bad_entry);
}

// The first entry that is not above the one before it, or whose offsets are damaged; -1 where there is none.
int64_t find_disorder(Array<const uint8_t> bytes, Array<const int64_t> offsets) {
  const Entries entries = entries_of(bytes, offsets, nullptr);
  nb::gil_scoped_release release;
  Text before{}, text{};
  for (int64_t entry = 0; entry < entries.num_entries; ++entry, before = text) {
    if (!entries.text(entry, &text) || (entry > 0 && is_not_above(text, before))) return entry;
  }
  return kNone;
}

}  // namespace

void define_find_rows(nb::module_& m) {
  m.def("find_rows", &find_rows);
  m.def("find_disorder", &find_disorder);
}
