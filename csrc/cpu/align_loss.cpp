// The cosine of align_loss; kernels/align_loss.py has the formula. z are projections of frames first, first + 1, ... of
// the (N, frames) frames of a batch; row i belongs to clip n = (first + i) / frames.
#include "common.h"

namespace {

struct half {
  uint16_t bits;
};

// A product moves the exponent to fp32's, which is right for subnormals too.
inline float to_float(half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = uint32_t(value.bits & 0x7FFF) << 13;
  float result;
  __builtin_memcpy(&result, &magnitude, 4);
  result *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &result, 4);
  bits |= sign | ((value.bits & 0x7C00) == 0x7C00 ? 0x7F800000 : 0);  // infinity and NaN
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

inline const float* as_float(const half* from, float* buffer, i64 size) {
#pragma omp simd
  for (i64 i = 0; i < size; ++i) buffer[i] = to_float(from[i]);
  return buffer;
}

// A row of the teacher in fp32. `kind` is the place of its dtype in _TEACHERS of kernels/align_loss.py.
inline const float* teacher_row(const void* teacher, i64 kind, i64 at, float* buffer, i64 E) {
  if (kind == 0) return static_cast<const float*>(teacher) + at;
  if (kind == 1) return as_float(static_cast<const bf16*>(teacher) + at, buffer, E);
  return as_float(static_cast<const half*>(teacher) + at, buffer, E);
}

inline float larger(float a, float b) { return a > b ? a : b; }

// Returns 1 - cos(z, y). With `gradient`, z becomes the gradient of scale * (1 - cos) and is added to dbias.
inline float cosine_row(float* z, const float* y, float scale, float* dbias, i64 E, bool gradient) {
  float dot = 0, zz = 0, yy = 0;
#pragma omp simd reduction(+ : dot, zz, yy)
  for (i64 e = 0; e < E; ++e) {
    dot += z[e] * y[e];
    zz += z[e] * z[e];
    yy += y[e] * y[e];
  }
  const float EPS = 1e-8f;  // that of F.cosine_similarity
  const float z_norm = __builtin_sqrtf(zz), z_scale = 1 / larger(z_norm, EPS);
  const float y_scale = 1 / larger(__builtin_sqrtf(yy), EPS), cosine = dot * z_scale * y_scale;
  if (gradient) {
    const float out = -scale * z_scale, along = z_norm > 0 ? cosine / z_norm : 0;
#pragma omp simd
    for (i64 e = 0; e < E; ++e) {
      z[e] = out * (y[e] * y_scale - z[e] * along);
      dbias[e] += z[e];
    }
  }
  return 1 - cosine;
}

template <class T>
void align_cosine(
    T* z,  // (K, rows, E); becomes its gradient
    const T* bias,  // (K, E)
    const void* teacher,  // (N, T, E)
    const i64* limits,  // (N,), valid frames
    const float* coefficient,  // (K, N)
    float* distance,  // (K, N * T)
    float* dbias,  // (K, chunks, E), sums over `chunk` rows each
    i64 first, i64 rows, i64 N, i64 frames, i64 teacher_n, i64 teacher_t,
    i64 K, i64 E, i64 chunk, i64 kind, i64 gradient) {
  const i64 chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel if (K * rows * E > PARALLEL)
  {
    Row z_row(E), y_row(E), unused(E);
#pragma omp for schedule(static)
    for (i64 piece = 0; piece < K * chunks; ++piece) {
      const i64 k = piece / chunks, start = piece % chunks * chunk;
      float* sums = gradient ? dbias + piece * E : unused;
      fill(sums, 0, E);
      for (i64 i = start; i < smaller(start + chunk, rows); ++i) {
        const i64 n = (first + i) / frames, t = (first + i) % frames;
        T* in = z + (k * rows + i) * E;
        float far = 0;
        if (t < limits[n]) {
#pragma omp simd
          for (i64 e = 0; e < E; ++e) z_row[e] = to_float(in[e]) + to_float(bias[k * E + e]);
          const float* y = teacher_row(teacher, kind, n * teacher_n + t * teacher_t, y_row, E);
          far = cosine_row(z_row, y, gradient ? coefficient[k * N + n] : 0, sums, E, gradient);
        } else {
          fill(z_row, 0, E);
        }
        distance[k * N * frames + first + i] = far;
        if (gradient) {
#pragma omp simd
          for (i64 e = 0; e < E; ++e) store(in + e, z_row[e]);
        }
      }
    }
  }
}

}  // namespace

AGREPA_EXPORT(align_cosine)
