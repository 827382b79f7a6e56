// What the kernels share: one source for three instruction sets.
//
// DPQ_MULTIVERSION compiles a function for AVX-512, AVX2 and the baseline and lets the loader choose. Where vectors stand
// in the source they must be as wide as the registers (GCC takes wider ones apart into single numbers), so such loops are
// templates over the number of lanes, and DPQ_DEFINE_BY_LANES makes the three functions and the choice between them.
// Helpers are force-inlined so that they take the instruction set of the function they stand in.
#pragma once

#include <cstdint>
#include <cstring>

#define DPQ_INLINE inline __attribute__((always_inline))
#define DPQ_INLINE_LAMBDA __attribute__((always_inline))  // behind a lambda's parameters
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define DPQ_HAS_LANES  // of AVX-512 and AVX2; elsewhere loops are of 4
#define DPQ_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// void name(const Args&), which is loop<lanes>(args) for the machine it runs on.
#define DPQ_DEFINE_BY_LANES(name, loop, Args)                                                        \
  __attribute__((target("arch=x86-64-v4"))) void name##_avx512(const Args& args) { loop<16>(args); } \
  __attribute__((target("arch=x86-64-v3"))) void name##_avx2(const Args& args) { loop<8>(args); }    \
  void name(const Args& args) {                                                                      \
    if (__builtin_cpu_supports("x86-64-v4")) return name##_avx512(args);                             \
    if (__builtin_cpu_supports("x86-64-v3")) return name##_avx2(args);                               \
    loop<4>(args);                                                                                   \
  }
#else
#define DPQ_MULTIVERSION
#define DPQ_DEFINE_BY_LANES(name, loop, Args) \
  void name(const Args& args) { loop<4>(args); }
#endif

namespace dpq {

constexpr int kMaxLanes = 16;  // arrays of codes are filled up to a multiple of it

template <int kLanes>
struct Lanes {
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

  static DPQ_INLINE Floats load(const float* from) {
    Floats to;
    std::memcpy(&to, from, sizeof(to));
    return to;
  }
  static DPQ_INLINE void store(float* to, const Floats& from) { std::memcpy(to, &from, sizeof(from)); }
};

}  // namespace dpq
