// Strings to rows. Its plain twin is find_rows in tests/references.py, which the tests hold it to.
// Offsets and slots come from a file, and each is checked as it is read.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "arrays.h"

namespace nb = nanobind;

namespace {

using dpq::kMissingRow;
using dpq::load;

constexpr int64_t kNone = -1;
constexpr int64_t kDamaged = -2;
constexpr int64_t kTogether = 32;  // ids searched in step, so that their cache misses overlap
constexpr int64_t kPrefetchTexts = 8;  // Python strings between the one looked at and the one asked from memory

template <typename T>
using Array = dpq::Array<T, 1>;

struct Text {
  const char* begin;
  int64_t size;
};

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

// 64 bits of a text: its size and its words, each multiplied in. id_index.py lays down what they are.
uint64_t fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product >> 64) ^ static_cast<uint64_t>(product);
}

uint64_t hash(Text text) {
  constexpr uint64_t kWord = 0x9e3779b97f4a7c15, kSize = 0xd1b54a32d192ed03;  // odd, with bits all over
  constexpr int64_t kWordBytes = 8;
  uint64_t word = 0, mixed = static_cast<uint64_t>(text.size) * kSize;
  if (text.size < kWordBytes) {
    std::memcpy(&word, text.begin, text.size);
    return fold(fold(mixed ^ word, kWord), kSize);
  }
  for (int64_t at = 0; at < text.size - kWordBytes; at += kWordBytes) {
    std::memcpy(&word, text.begin + at, kWordBytes);
    mixed = fold(mixed ^ word, kWord);
  }
  std::memcpy(&word, text.begin + text.size - kWordBytes, kWordBytes);
  return fold(fold(mixed ^ word, kWord), kSize);
}

// Where the search for a text in the slots stands.
struct Probe {
  uint64_t hash;
  int64_t at;    // the slot that comes next
  int64_t left;  // slots that have not been seen
};

// A hash table with linear probing. A slot is 0, or the number of an entry plus 1 in its lowest bits and above them, as
// its tag, as many bits of the entry's hash as there is room for.
template <typename T>
struct Slots {
  T* slots;
  int64_t num_slots, num_entries;
  int entry_bits;

  Slots(T* slots_, int64_t num_slots_, int64_t num_entries_)
      : slots(slots_), num_slots(num_slots_), num_entries(num_entries_), entry_bits(0) {
    while (num_entries >> entry_bits != 0) ++entry_bits;
  }
  Probe begin(uint64_t hash) const {
    const int64_t home = static_cast<int64_t>(static_cast<unsigned __int128>(hash) * num_slots >> 64);
    __builtin_prefetch(slots + home);
    return Probe{hash, home, num_slots};
  }
  int64_t after(int64_t at) const { return at + 1 == num_slots ? 0 : at + 1; }
  uint32_t tag(uint64_t hash) const { return static_cast<uint32_t>(hash << entry_bits); }
  bool has_tag(uint32_t slot, uint64_t hash) const { return uint64_t{slot ^ tag(hash)} >> entry_bits == 0; }
  int64_t entry_of(uint32_t slot) const { return static_cast<int64_t>(slot & ((uint64_t{1} << entry_bits) - 1)) - 1; }

  // The next entry that has the tag; kNone at an empty slot, kDamaged where slots name no entry or have no end.
  int64_t next(Probe* probe) const {
    for (; probe->left > 0; --probe->left) {
      const uint32_t slot = load(slots + probe->at);
      if (slot == 0) return kNone;
      probe->at = after(probe->at);
      if (!has_tag(slot, probe->hash)) continue;
      --probe->left;
      const int64_t entry = entry_of(slot);
      return entry >= 0 && entry < num_entries ? entry : kDamaged;
    }
    return kDamaged;
  }
  void put(uint64_t hash, int64_t at, int64_t entry) const {
    while (slots[at] != 0) at = after(at);
    slots[at] = tag(hash) + static_cast<uint32_t>(entry + 1);
  }
};

// Rows of up to kTogether ids by their slots; returns an entry that is damaged, their number where it is the slots, or
// kNone. The slots of all are asked from memory, then the offsets, then texts and rows.
int64_t probe_together(const Entries& e, const Slots<const uint32_t>& slots, const Text* ids, int64_t num_ids,
                       int64_t* rows) {
  Probe probes[kTogether];
  int64_t entries[kTogether];
  for (int64_t n = 0; n < num_ids; ++n) probes[n] = slots.begin(hash(ids[n]));
  for (int64_t n = 0; n < num_ids; ++n) {
    entries[n] = slots.next(&probes[n]);
    if (entries[n] >= 0) e.prefetch_offsets(entries[n]);
  }
  for (int64_t n = 0; n < num_ids; ++n) {
    if (entries[n] < 0) continue;
    e.prefetch_text(entries[n]);
    __builtin_prefetch(e.rows + entries[n]);
  }
  Text text;
  for (int64_t n = 0; n < num_ids; ++n) {
    int64_t entry = entries[n];
    for (; entry != kNone; entry = slots.next(&probes[n])) {
      if (entry == kDamaged) return e.num_entries;
      if (!e.text(entry, &text)) return entry;
      if (is_equal(text, ids[n])) break;
    }
    rows[n] = entry == kNone ? kMissingRow : load(e.rows + entry);
  }
  return kNone;
}

Entries entries_of(const Array<const uint8_t>& bytes, const Array<const int64_t>& offsets, const uint32_t* rows) {
  if (offsets.size() == 0) dpq::refuse("offsets", "none", "one more than there are ids");
  return Entries{reinterpret_cast<const char*>(bytes.data()), offsets.data(), rows,
                 static_cast<int64_t>(bytes.shape(0)), static_cast<int64_t>(offsets.shape(0)) - 1};
}

// The UTF-8 of Python strings, in place; returns the position of the first one that has none, or kNone.
int64_t view_texts(nb::tuple ids, std::vector<Text>* texts) {
  texts->reserve(ids.size());
  const size_t num_ids = ids.size();
  for (size_t n = 0; n < num_ids; ++n) {
    __builtin_prefetch(PyTuple_GET_ITEM(ids.ptr(), std::min(n + kPrefetchTexts, num_ids - 1)));
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

// Rows of ids: by slots where there are some, else by halving.
int64_t search_all(const Entries& entries, const std::optional<Array<const uint32_t>>& slots,
                   const std::vector<Text>& ids, int64_t* rows) {
  const int64_t num_ids = static_cast<int64_t>(ids.size());
  if (entries.num_entries == 0) std::fill_n(rows, num_ids, kMissingRow);
  const Slots<const uint32_t> table(slots ? slots->data() : nullptr, slots ? slots->shape(0) : 0, entries.num_entries);
  int64_t bad_entry = kNone;
  for (int64_t n = 0; n < num_ids && entries.num_entries != 0 && bad_entry == kNone; n += kTogether) {
    const int64_t together = std::min(kTogether, num_ids - n);
    bad_entry = slots ? probe_together(entries, table, ids.data() + n, together, rows + n)
                      : search_together(entries, ids.data() + n, together, rows + n);
  }
  return bad_entry;
}

// Returns (position of the first id that is no UTF-8 text, a damaged entry or their number where it is the slots), -1
// where there is none. `ids` is a tuple: it keeps its strings, whatever other threads do, while the GIL is released.
nb::tuple find_rows(nb::tuple ids, Array<const uint8_t> bytes, Array<const int64_t> offsets, Array<const uint32_t> rows,
                    std::optional<Array<const uint32_t>> slots, Array<int64_t> out) {
  const Entries entries = entries_of(bytes, offsets, rows.data());
  dpq::check_shape("rows", rows, {entries.num_entries});
  dpq::check_shape("out", out, {static_cast<int64_t>(ids.size())});
  std::vector<Text> texts;
  const int64_t bad_id_at = view_texts(ids, &texts);
  if (bad_id_at != kNone) return nb::make_tuple(bad_id_at, kNone);
  int64_t bad_entry = kNone;
  {
    nb::gil_scoped_release release;
    bad_entry = search_all(entries, slots, texts, out.data());
  }
  return nb::make_tuple(kNone, bad_entry);
}

// Fills slots, more than there are entries, in the order of the entries; returns an entry whose offsets are damaged, or
// kNone.
int64_t fill_slots(Array<const uint8_t> bytes, Array<const int64_t> offsets, Array<uint32_t> slots) {
  const Entries entries = entries_of(bytes, offsets, nullptr);
  dpq::check_range("num_ids", entries.num_entries, 0, UINT32_MAX);
  dpq::check_range("num_slots", dpq::size_of(slots), entries.num_entries + 1, INT64_MAX);  // a search ends at a free one
  const Slots<uint32_t> table(slots.data(), slots.shape(0), entries.num_entries);
  nb::gil_scoped_release release;
  std::fill_n(slots.data(), slots.size(), 0);
  Text text{};
  Probe homes[kTogether];
  for (int64_t first = 0; first < entries.num_entries; first += kTogether) {
    const int64_t together = std::min(kTogether, entries.num_entries - first);
    for (int64_t n = 0; n < together; ++n) {
      if (!entries.text(first + n, &text)) return first + n;
      homes[n] = table.begin(hash(text));
    }
    for (int64_t n = 0; n < together; ++n) table.put(homes[n].hash, homes[n].at, first + n);
  }
  return kNone;
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
  m.def("find_rows", &find_rows, nb::arg("ids"), dpq::array("id_bytes"), dpq::array("id_offsets"), dpq::array("rows"),
        dpq::array("slots").none(), dpq::array("out"));
  m.def("fill_slots", &fill_slots, dpq::array("id_bytes"), dpq::array("id_offsets"), dpq::array("slots"));
  m.def("find_disorder", &find_disorder, dpq::array("id_bytes"), dpq::array("id_offsets"));
}
