// qk_norm_rope: kernels/qk_norm_rope.py has the formula. Strides are in elements: _n over rows, _h over heads, _t over
// frames.
#include "common.h"

namespace {

inline float inverse_rms(const float* x, i64 E, float eps) {
  double squares = 0;  // as accurate on every instruction set
#pragma omp simd reduction(+ : squares)
  for (i64 e = 0; e < E; ++e) squares += x[e] * x[e];
  return 1.0f / __builtin_sqrtf(squares / E + eps);
}

// Rotates the pairs of a head in place; `direction` -1 rotates back.
inline void rotate(float* x, const float* cos, const float* sin, float direction, i64 E, bool interleaved) {
  const i64 half = E / 2;
  if (interleaved) {
#pragma omp simd
    for (i64 i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1], s = direction * sin[i];
      x[2 * i] = a * cos[i] - b * s;
      x[2 * i + 1] = b * cos[i] + a * s;
    }
  } else {
#pragma omp simd
    for (i64 i = 0; i < half; ++i) {
      const float a = x[i], b = x[half + i], s = direction * sin[i];
      x[i] = a * cos[i] - b * s;
      x[half + i] = b * cos[i] + a * s;
    }
  }
}

template <class T>
void qk_norm_rope_fwd(
    const T* qkv,  // (N, T, 3 D)
    const float* cos,  // (T, E / 2), or null: no rotation
    const float* sin,  // as cos
    const float* q_weight,  // (E,), or null: no norm
    const float* k_weight,  // as q_weight
    T* q,  // (N, T, H, E) contiguous
    T* k,  // (N, T, H, E) contiguous
    i64 N, i64 frames, i64 H, i64 E, i64 rotary, i64 interleaved, i64 x_n, i64 x_t,
    float eps) {
  const i64 D = H * E;
#pragma omp parallel if (N * frames * D > PARALLEL)
  {
    Row row(D);
#pragma omp for schedule(static)
    for (i64 i = 0; i < N * frames; ++i) {
      const i64 n = i / frames, t = i % frames;
      for (i64 part = 0; part < 2; ++part) {
        const T* x = qkv + n * x_n + t * x_t + part * D;
        const float* weight = part == 0 ? q_weight : k_weight;
        T* y = (part == 0 ? q : k) + i * D;
#pragma omp simd
        for (i64 d = 0; d < D; ++d) row[d] = to_float(x[d]);
        for (i64 h = 0; h < H; ++h) {
          float* head = row + h * E;
          if (weight != nullptr) {
            const float rrms = inverse_rms(head, E, eps);
#pragma omp simd
            for (i64 e = 0; e < E; ++e) head[e] *= rrms * weight[e];
          }
          if (cos != nullptr && h < rotary) rotate(head, cos + t * (E / 2), sin + t * (E / 2), 1, E, interleaved);
        }
#pragma omp simd
        for (i64 d = 0; d < D; ++d) store(y + d, row[d]);
      }
    }
  }
}

// dy becomes the gradient of a head x that was normalised; adds dy * xhat to dweight.
inline void norm_head_backward(float* dy, const float* x, const float* weight, float* dweight, i64 E, float eps) {
  const float rrms = inverse_rms(x, E, eps);
  double along = 0;
#pragma omp simd reduction(+ : along)
  for (i64 e = 0; e < E; ++e) {
    const float xhat = x[e] * rrms;
    dweight[e] += dy[e] * xhat;
    along += dy[e] * weight[e] * xhat;
  }
  const float mean = along / E;
#pragma omp simd
  for (i64 e = 0; e < E; ++e) dy[e] = (dy[e] * weight[e] - x[e] * rrms * mean) * rrms;
}

template <class T>
void qk_norm_rope_bwd(
    const T* dq,  // (N, H, T, E)
    const T* dk,  // (N, H, T, E)
    const T* dv,  // (N, H, T, E)
    const T* qkv,  // (N, T, 3 D), or null: no norm
    const float* cos,  // (T, E / 2), or null: no rotation
    const float* sin,  // as cos
    const float* q_weight,  // (E,), or null: no norm
    const float* k_weight,  // as q_weight
    T* dqkv,  // (N, T, 3 D) contiguous
    float* dweight,  // (N * chunks, 2, E), sums over `chunk` frames each; not written without norm
    i64 N, i64 frames, i64 H, i64 E, i64 rotary, i64 interleaved, i64 chunk,
    i64 dq_n, i64 dq_h, i64 dq_t, i64 dk_n, i64 dk_h, i64 dk_t, i64 dv_n, i64 dv_h, i64 dv_t,
    i64 x_n, i64 x_t,
    float eps) {
  const i64 D = H * E, chunks = (frames + chunk - 1) / chunk;
#pragma omp parallel if (N * frames * D > PARALLEL)
  {
    Row dy(E), x(E);
#pragma omp for schedule(static)
    for (i64 piece = 0; piece < N * chunks; ++piece) {
      const i64 n = piece / chunks, first = piece % chunks * chunk;
      float* sums = dweight + piece * 2 * E;
      if (qkv != nullptr) fill(sums, 0, 2 * E);
      for (i64 t = first; t < smaller(first + chunk, frames); ++t) {
        T* dx = dqkv + (n * frames + t) * 3 * D;
        for (i64 part = 0; part < 2; ++part) {
          const T* from = part == 0 ? dq + n * dq_n + t * dq_t : dk + n * dk_n + t * dk_t;
          const i64 step = part == 0 ? dq_h : dk_h;
          for (i64 h = 0; h < H; ++h) {
#pragma omp simd
            for (i64 e = 0; e < E; ++e) dy[e] = to_float(from[h * step + e]);
            if (cos != nullptr && h < rotary) rotate(dy, cos + t * (E / 2), sin + t * (E / 2), -1, E, interleaved);
            if (qkv != nullptr)
              norm_head_backward(dy, as_float(qkv + n * x_n + t * x_t + part * D + h * E, x, E),
                                 part == 0 ? q_weight : k_weight, sums + part * E, E, eps);
#pragma omp simd
            for (i64 e = 0; e < E; ++e) store(dx + part * D + h * E + e, dy[e]);
          }
        }
        for (i64 h = 0; h < H; ++h)
          __builtin_memcpy(dx + 2 * D + h * E, dv + n * dv_n + h * dv_h + t * dv_t, E * sizeof(T));
      }
    }
  }
}

}  // namespace

AGREPA_EXPORT(qk_norm_rope_fwd)
AGREPA_EXPORT(qk_norm_rope_bwd)
