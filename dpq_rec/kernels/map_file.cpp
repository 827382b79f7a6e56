// A file's bytes, mapped. Python's own mmap keeps a descriptor open for each file, and a process has few of them.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace nb = nanobind;

namespace {

struct Mapping {
  void* start;
  size_t num_bytes;
  ~Mapping() { munmap(start, num_bytes); }
};

using Bytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;

// The descriptor may be closed afterwards: the mapping stays until the last array on it is gone.
Bytes map_file(int descriptor, size_t num_bytes) {
  void* const start = mmap(nullptr, num_bytes, PROT_READ, MAP_SHARED, descriptor, 0);
  if (start == MAP_FAILED) {
    PyErr_SetFromErrno(PyExc_OSError);
    throw nb::python_error();
  }
  const nb::capsule owner(new Mapping{start, num_bytes},
                          [](void* mapping) noexcept { delete static_cast<Mapping*>(mapping); });
  return Bytes(start, {num_bytes}, owner);
}

}  // namespace

void define_map_file(nb::module_& m) { m.def("map_file", &map_file); }
