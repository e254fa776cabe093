// Element types, row buffers and exported names of all CPU operations.
//
// Each operation's file is compiled three times (AGREPA_ISA = generic, avx2, avx512), and Python picks one at run time.
// Everything lives in unnamed namespaces and nothing from the C++ library is instantiated: otherwise the linker could
// keep an inline function compiled for AVX-512, which a machine without it would run.
#pragma once
#include <stdint.h>
#include <stdlib.h>

namespace {

using i64 = int64_t;

struct bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline void store(float* to, float value) { *to = value; }

// Round to nearest even; NaN stays NaN.
inline void store(bf16* to, float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  uint32_t quiet = (bits >> 16) | 0x40;
  to->bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
}

// An fp32 row that belongs to one thread.
struct Row {
  float* data;
  explicit Row(i64 size) : data(static_cast<float*>(aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64 + 64))) {
    if (data == nullptr) abort();
  }
  ~Row() { free(data); }
  Row(const Row&) = delete;
  operator float*() { return data; }
};

// `size` elements at `from` as fp32: in place, or converted into `buffer`.
inline const float* as_float(const float* from, float*, i64) { return from; }

inline const float* as_float(const bf16* from, float* buffer, i64 size) {
#pragma omp simd
  for (i64 i = 0; i < size; ++i) buffer[i] = to_float(from[i]);
  return buffer;
}

inline void fill(float* to, float value, i64 size) {
#pragma omp simd
  for (i64 i = 0; i < size; ++i) to[i] = value;
}

inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// Below this many elements a parallel region costs more than it saves.
constexpr i64 PARALLEL = 1 << 15;

}  // namespace

#define AGREPA_JOIN2(op, type, isa) agrepa_##op##_##type##_##isa
#define AGREPA_JOIN(op, type, isa) AGREPA_JOIN2(op, type, isa)
// Exports a function template for both element types, as pointers named agrepa_<op>_<dtype>_<isa>.
#define AGREPA_EXPORT(op)                                                                                          \
  extern "C" {                                                                                                     \
  __attribute__((visibility("default"))) void* AGREPA_JOIN(op, float32, AGREPA_ISA) = (void*)&op<float>;           \
  __attribute__((visibility("default"))) void* AGREPA_JOIN(op, bfloat16, AGREPA_ISA) = (void*)&op<bf16>;           \
  }
