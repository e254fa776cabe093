// Layer norm of one row of D elements and its gradient, in fp32.
#pragma once
#include "common.h"

namespace {

// Two passes over a row that stays in cache: no cancellation.
inline void row_statistics(const float* x, i64 D, float eps, float* mean, float* rstd) {
  constexpr i64 LANES = 32;  // partial sums of few terms, on every instruction set, keep fp32 accurate
  float sums[LANES] = {}, squares[LANES] = {};
  const i64 whole = D / LANES * LANES;
  for (i64 d = 0; d < whole; d += LANES)
#pragma omp simd
    for (i64 j = 0; j < LANES; ++j) sums[j] += x[d + j];
  for (i64 d = whole; d < D; ++d) sums[d - whole] += x[d];
  double total = 0;
  for (i64 j = 0; j < LANES; ++j) total += sums[j];
  const float m = total / D;
  for (i64 d = 0; d < whole; d += LANES)
#pragma omp simd
    for (i64 j = 0; j < LANES; ++j) squares[j] += (x[d + j] - m) * (x[d + j] - m);
  for (i64 d = whole; d < D; ++d) squares[d - whole] += (x[d] - m) * (x[d] - m);
  total = 0;
  for (i64 j = 0; j < LANES; ++j) total += squares[j];
  *mean = m;
  *rstd = 1.0f / __builtin_sqrtf(total / D + eps);
}

template <class T>
inline void modulate_row(const float* x, const float* scale, const float* shift, float mean, float rstd, T* y, i64 D) {
#pragma omp simd
  for (i64 d = 0; d < D; ++d) store(y + d, (x[d] - mean) * rstd * (1 + scale[d]) + shift[d]);
}

// dx of the modulated norm into dx; adds dy * xhat to dscale and dy to dshift.
inline void norm_row_backward(const float* dy, const float* x, const float* scale, float mean, float rstd, float* dx,
                              float* dscale, float* dshift, i64 D) {
  float along = 0, total = 0;
#pragma omp simd reduction(+ : along, total)
  for (i64 d = 0; d < D; ++d) {
    const float xhat = (x[d] - mean) * rstd, g = dy[d] * (1 + scale[d]);
    along += g * xhat;
    total += g;
    dscale[d] += dy[d] * xhat;
    dshift[d] += dy[d];
  }
  along /= D;
  total /= D;
#pragma omp simd
  for (i64 d = 0; d < D; ++d) {
    const float xhat = (x[d] - mean) * rstd;
    dx[d] = rstd * (dy[d] * (1 + scale[d]) - total - xhat * along);
  }
}

}  // namespace
