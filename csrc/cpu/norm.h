// Layer norm of one row and its gradient, in fp32. x, dy ... are rows of D elements.
#pragma once
#include <math.h>

#include "common.h"

namespace {

// Two passes over a row that stays in cache: no cancellation.
inline void row_statistics(const float* x, i64 D, float eps, float* mean, float* rstd) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (i64 d = 0; d < D; ++d) sum += x[d];
  const float m = sum / D;
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (i64 d = 0; d < D; ++d) squares += (x[d] - m) * (x[d] - m);
  *mean = m;
  *rstd = 1.0f / __builtin_sqrtf(squares / D + eps);
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
