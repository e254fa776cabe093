// gated_residual: kernels/gated_residual.py has the formula. Absent tensors are null. Strides are in elements: _n over
// rows (conditions for modulations), _t over frames.
#include "norm.h"

namespace {

template <class T>
void gated_residual_fwd(
    const T* h,  // (N, T, D)
    const T* f,  // (N, T, D)
    const T* gate,  // (C, D), or (C, T, D)
    const float* m,  // (N,), or null: 1
    const T* scale,  // as gate, null without norm
    const T* shift,  // as scale
    const i64* lengths,  // (length_count,), or null: all frames are valid
    T* out,  // h', (N, T, D) contiguous
    T* y,  // (N, T, D) contiguous, or null: no norm
    float* sums,  // (N, chunks, D), sums of valid h' over `chunk` frames each, or null: no time-sum
    float* mean,  // (N, T)
    float* rstd,  // (N, T)
    i64 N, i64 frames, i64 D, i64 C, i64 length_count, i64 chunk,
    i64 h_n, i64 h_t, i64 f_n, i64 f_t, i64 gate_n, i64 gate_t,
    i64 scale_n, i64 scale_t, i64 shift_n, i64 shift_t,
    float eps) {
  const i64 chunks = (frames + chunk - 1) / chunk;
#pragma omp parallel if (N * frames * D > PARALLEL)
  {
    Row h_row(D), f_row(D), gates(D), scales(D), shifts(D), out_row(D);
#pragma omp for schedule(static)
    for (i64 piece = 0; piece < N * chunks; ++piece) {
      const i64 n = piece / chunks, c = n % C, first = piece % chunks * chunk;
      const i64 valid = lengths ? lengths[n % length_count] : frames;
      const float row_gate = m ? m[n] : 1;
      if (sums) fill(sums + piece * D, 0, D);
      for (i64 t = first; t < smaller(first + chunk, frames); ++t) {
        const i64 i = n * frames + t;
        T* stored = out + i * D;
        const T* h_in = h + n * h_n + t * h_t;
        if (row_gate == 0) {  // h bit for bit, even if f is not finite
          __builtin_memcpy(stored, h_in, D * sizeof(T));
        } else {
          const float *in = as_float(h_in, h_row, D), *branch = as_float(f + n * f_n + t * f_t, f_row, D);
          const float* g = as_float(gate + c * gate_n + t * gate_t, gates, D);
#pragma omp simd
          for (i64 d = 0; d < D; ++d) store(stored + d, in[d] + row_gate * g[d] * branch[d]);
        }
        if (!sums && !y) continue;
        const float* rounded = as_float(stored, out_row, D);
        if (sums && t < valid) {
          float* sum = sums + piece * D;
#pragma omp simd
          for (i64 d = 0; d < D; ++d) sum[d] += rounded[d];
        }
        if (y) {
          row_statistics(rounded, D, eps, mean + i, rstd + i);
          modulate_row(rounded, as_float(scale + c * scale_n + t * scale_t, scales, D),
                       as_float(shift + c * shift_n + t * shift_t, shifts, D), mean[i], rstd[i], y + i * D, D);
        }
      }
    }
  }
}

template <class T>
void gated_residual_bwd(
    const T* dout,  // of h', (N, T, D), or null
    const T* dy,  // (N, T, D), or null: no norm
    const float* dsum,  // (N, D), or null
    const T* f,  // (N, T, D)
    const T* out,  // h', (N, T, D) contiguous, null without dy
    const T* gate,  // (C, D), or (C, T, D)
    const float* m,  // (N,), or null: 1
    const T* scale,  // as gate, null without dy
    const i64* lengths,  // (length_count,), or null: all frames are valid
    const float* mean,  // (N, T), null without dy
    const float* rstd,  // as mean
    T* dh,  // (N, T, D) contiguous, or null: it is dout
    T* df,  // (N, T, D) contiguous
    float* dgate,  // (N, chunks, D), before m: sums over `chunk` frames each
    float* dscale,  // as dgate, null without dy
    float* dshift,  // as dscale
    i64 N, i64 frames, i64 D, i64 C, i64 length_count, i64 chunk,
    i64 dout_n, i64 dout_t, i64 dy_n, i64 dy_t, i64 f_n, i64 f_t,
    i64 gate_n, i64 gate_t, i64 scale_n, i64 scale_t) {
  const i64 chunks = (frames + chunk - 1) / chunk;
#pragma omp parallel if (N * frames * D > PARALLEL)
  {
    Row dout_row(D), dy_row(D), f_row(D), out_row(D), gates(D), scales(D), total(D);
#pragma omp for schedule(static)
    for (i64 piece = 0; piece < N * chunks; ++piece) {
      const i64 n = piece / chunks, c = n % C, first = piece % chunks * chunk;
      const i64 valid = lengths ? lengths[n % length_count] : frames;
      const float row_gate = m ? m[n] : 1;
      float* dgates = dgate + piece * D;
      fill(dgates, 0, D);
      if (dy) {
        fill(dscale + piece * D, 0, D);
        fill(dshift + piece * D, 0, D);
      }
      for (i64 t = first; t < smaller(first + chunk, frames); ++t) {
        const i64 i = n * frames + t;
        float* sum = total;
        if (dy)
          norm_row_backward(as_float(dy + n * dy_n + t * dy_t, dy_row, D), as_float(out + i * D, out_row, D),
                            as_float(scale + c * scale_n + t * scale_t, scales, D), mean[i], rstd[i], sum,
                            dscale + piece * D, dshift + piece * D, D);
        else
          fill(sum, 0, D);
        if (dout) {
          const float* given = as_float(dout + n * dout_n + t * dout_t, dout_row, D);
#pragma omp simd
          for (i64 d = 0; d < D; ++d) sum[d] += given[d];
        }
        if (dsum && t < valid) {
          const float* given = dsum + n * D;
#pragma omp simd
          for (i64 d = 0; d < D; ++d) sum[d] += given[d];
        }
        if (dh) {
          T* to_h = dh + i * D;
#pragma omp simd
          for (i64 d = 0; d < D; ++d) store(to_h + d, sum[d]);
        }
        T* to_f = df + i * D;
        const float* g = as_float(gate + c * gate_n + t * gate_t, gates, D);
        if (row_gate == 0) {
#pragma omp simd
          for (i64 d = 0; d < D; ++d) store(to_f + d, 0.0f);
          continue;
        }
        const float* branch = as_float(f + n * f_n + t * f_t, f_row, D);
#pragma omp simd
        for (i64 d = 0; d < D; ++d) {
          store(to_f + d, row_gate * g[d] * sum[d]);
          dgates[d] += branch[d] * sum[d];
        }
      }
    }
  }
}

}  // namespace

AGREPA_EXPORT(gated_residual_fwd)
AGREPA_EXPORT(gated_residual_bwd)
