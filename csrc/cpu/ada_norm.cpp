// ada_norm: kernels/ada_norm.py has the formula. Strides are in elements: _n over rows (conditions for modulations), _t
// over frames.
#include "norm.h"

namespace {

template <class T>
void ada_norm_fwd(
    const T* x,  // (N, T, D)
    const T* scale,  // (C, D), or (C, T, D)
    const T* shift,  // as scale
    T* y,  // (N, T, D) contiguous
    float* mean,  // (N, T)
    float* rstd,  // (N, T)
    i64 N, i64 frames, i64 D, i64 C,
    i64 x_n, i64 x_t, i64 scale_n, i64 scale_t, i64 shift_n, i64 shift_t,
    float eps) {
#pragma omp parallel if (N * frames * D > PARALLEL)
  {
    Row row(D), scales(D), shifts(D);
#pragma omp for schedule(static)
    for (i64 i = 0; i < N * frames; ++i) {
      const i64 n = i / frames, t = i % frames, c = n % C;
      const float* in = as_float(x + n * x_n + t * x_t, row, D);
      row_statistics(in, D, eps, mean + i, rstd + i);
      modulate_row(in, as_float(scale + c * scale_n + t * scale_t, scales, D),
                   as_float(shift + c * shift_n + t * shift_t, shifts, D), mean[i], rstd[i], y + i * D, D);
    }
  }
}

template <class T>
void ada_norm_bwd(
    const T* dy,  // (N, T, D)
    const T* x,  // (N, T, D)
    const T* scale,  // (C, D), or (C, T, D)
    const float* mean,  // (N, T)
    const float* rstd,  // (N, T)
    T* dx,  // (N, T, D) contiguous
    float* dscale,  // (N, chunks, D), sums over `chunk` frames each
    float* dshift,  // as dscale
    i64 N, i64 frames, i64 D, i64 C, i64 chunk,
    i64 dy_n, i64 dy_t, i64 x_n, i64 x_t, i64 scale_n, i64 scale_t) {
  const i64 chunks = (frames + chunk - 1) / chunk;
#pragma omp parallel if (N * frames * D > PARALLEL)
  {
    Row dy_row(D), x_row(D), scales(D), dx_row(D);
#pragma omp for schedule(static)
    for (i64 piece = 0; piece < N * chunks; ++piece) {
      const i64 n = piece / chunks, c = n % C, first = piece % chunks * chunk;
      float *dscales = dscale + piece * D, *dshifts = dshift + piece * D;
      fill(dscales, 0, D);
      fill(dshifts, 0, D);
      for (i64 t = first; t < smaller(first + chunk, frames); ++t) {
        const i64 i = n * frames + t;
        norm_row_backward(as_float(dy + n * dy_n + t * dy_t, dy_row, D), as_float(x + n * x_n + t * x_t, x_row, D),
                          as_float(scale + c * scale_n + t * scale_t, scales, D), mean[i], rstd[i], dx_row, dscales,
                          dshifts, D);
#pragma omp simd
        for (i64 d = 0; d < D; ++d) store(dx + i * D + d, dx_row[d]);
      }
    }
  }
}

}  // namespace

AGREPA_EXPORT(ada_norm_fwd)
AGREPA_EXPORT(ada_norm_bwd)
