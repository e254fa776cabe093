// The elementwise passes of linear_gelu; kernels/linear_gelu.py has the formula. All tensors are contiguous.
#include "gelu.h"

namespace {

// z + bias of one row, in fp32.
template <class T>
inline void biased_row(const T* z, const T* bias, float* row, i64 E) {
  if (bias == nullptr) {
#pragma omp simd
    for (i64 e = 0; e < E; ++e) row[e] = to_float(z[e]);
  } else {
#pragma omp simd
    for (i64 e = 0; e < E; ++e) row[e] = to_float(z[e]) + to_float(bias[e]);
  }
}

template <bool TANH, class T>
inline void gelu_row(const float* z, T* y, i64 E) {
#pragma omp simd
  for (i64 e = 0; e < E; ++e) store(y + e, gelu<TANH>(z[e]));
}

// dz = dy gelu'(z) over z; adds it to dbias.
template <bool TANH>
inline void slope_row(const float* dy, float* z, float* dbias, i64 E) {
#pragma omp simd
  for (i64 e = 0; e < E; ++e) {
    z[e] = dy[e] * gelu_slope<TANH>(z[e]);
    dbias[e] += z[e];
  }
}

template <class T>
void gelu_fwd(
    const T* z,  // (groups, M, E)
    const T* bias,  // (groups, E), or null: 0
    T* y,  // (groups, M, E); may be z
    i64 groups, i64 M, i64 E, i64 tanh) {
#pragma omp parallel if (groups * M * E > PARALLEL)
  {
    Row row(E);
#pragma omp for schedule(static)
    for (i64 i = 0; i < groups * M; ++i) {
      biased_row(z + i * E, bias == nullptr ? bias : bias + i / M * E, row, E);
      if (tanh)
        gelu_row<true>(row, y + i * E, E);
      else
        gelu_row<false>(row, y + i * E, E);
    }
  }
}

template <class T>
void gelu_bwd(
    const T* dy,  // (groups, M, E)
    const T* z,  // (groups, M, E)
    const T* bias,  // (groups, E), or null: 0
    T* dz,  // (groups, M, E); may be dy
    float* dbias,  // (groups, chunks, E), sums over `chunk` rows each
    i64 groups, i64 M, i64 E, i64 chunk, i64 tanh) {
  const i64 chunks = (M + chunk - 1) / chunk;
#pragma omp parallel if (groups * M * E > PARALLEL)
  {
    Row row(E), dy_row(E);
#pragma omp for schedule(static)
    for (i64 piece = 0; piece < groups * chunks; ++piece) {
      const i64 group = piece / chunks, first = piece % chunks * chunk;
      float* sums = dbias + piece * E;
      fill(sums, 0, E);
      for (i64 m = first; m < smaller(first + chunk, M); ++m) {
        const i64 at = (group * M + m) * E;
        biased_row(z + at, bias == nullptr ? bias : bias + group * E, row, E);
        const float* in = as_float(dy + at, dy_row, E);
        if (tanh)
          slope_row<true>(in, row, sums, E);
        else
          slope_row<false>(in, row, sums, E);
#pragma omp simd
        for (i64 e = 0; e < E; ++e) store(dz + at + e, row[e]);
      }
    }
  }
}

}  // namespace

AGREPA_EXPORT(gelu_fwd)
AGREPA_EXPORT(gelu_bwd)
