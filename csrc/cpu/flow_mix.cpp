// flow_mix: kernels/flow_mix.py has the formula. The noise is Philox4x32-10, then Box-Muller with polynomials of the
// Cephes library (S. Moshier), whose loops vectorise.
#include "common.h"

namespace {

constexpr i64 COUNTERS = 256;  // drawn at a time, four normals each

struct Words {
  uint32_t word[4][COUNTERS];
};

// The four words of counters first ... first + COUNTERS - 1.
inline void philox(uint64_t key, uint32_t first, Words* out) {
#pragma omp simd
  for (i64 i = 0; i < COUNTERS; ++i) {
    uint32_t c0 = first + uint32_t(i), c1 = 0, c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t high = uint64_t(0xCD9E8D57) * c2, low = uint64_t(0xD2511F53) * c0;
      c0 = uint32_t(high >> 32) ^ c1 ^ k0;
      c1 = uint32_t(high);
      c2 = uint32_t(low >> 32) ^ c3 ^ k1;
      c3 = uint32_t(low);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    out->word[0][i] = c0;
    out->word[1][i] = c1;
    out->word[2][i] = c2;
    out->word[3][i] = c3;
  }
}

// Triton folds the sign bit instead of shifting.
inline float uniform(uint32_t word) {
  const int32_t folded = int32_t(word) < 0 ? int32_t(~word) : int32_t(word);
  return float(folded) * 4.6566127342e-10f;
}

// Natural logarithm of a normal number: 2^exponent (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
inline float logarithm(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t shifted = bits - 0x3F3504F3;  // sqrt(1/2)
  const float exponent = float(int32_t(shifted) >> 23);
  bits = (shifted & 0x007FFFFF) + 0x3F3504F3;
  float m;
  __builtin_memcpy(&m, &bits, 4);
  const float f = m - 1, f2 = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return exponent * 0.693359375f + (f + (f * f2 * p - 0.5f * f2 + exponent * -2.12194440e-4f));
}

// cos and sin of 2 pi u, u in [0, 1): the nearest quarter turn is subtracted exactly, in u.
inline void turn(float u, float* cos, float* sin) {
  const int32_t quarter = int32_t(4 * u + 0.5f);
  const float angle = 6.283185307179586f * (u - 0.25f * float(quarter)), z = angle * angle;
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * angle + angle;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1;
  const float x = quarter & 1 ? s : c, y = quarter & 1 ? c : s;
  *cos = (quarter + 1) & 2 ? -x : x;
  *sin = quarter & 2 ? -y : y;
}

// 4 * COUNTERS normals, in the order of the elements.
inline void draw(uint64_t key, uint32_t first, Words* words, float* normals) {
  philox(key, first, words);
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t *radii = words->word[2 * pair], *angles = words->word[2 * pair + 1];
#pragma omp simd
    for (i64 i = 0; i < COUNTERS; ++i) {
      const float u = uniform(radii[i]);
      const float radius = __builtin_sqrtf(-2 * logarithm(u < 1e-7f ? 1e-7f : u));
      float cos, sin;
      turn(uniform(angles[i]), &cos, &sin);
      normals[4 * i + 2 * pair] = radius * cos;
      normals[4 * i + 2 * pair + 1] = radius * sin;
    }
  }
}

template <class T>
void flow_mix(
    const T* x,  // (C, T, M) contiguous
    const float* t,  // (C,), or (C, T)
    const i64* keys,  // (C,)
    T* x_t,  // (C, T, M) contiguous
    T* target,  // (C, T, M) contiguous
    i64 C, i64 frames, i64 bins, i64 t_c, i64 t_t,
    float sigma) {
  const i64 elements = frames * bins, tiles = (elements + 4 * COUNTERS - 1) / (4 * COUNTERS);
#pragma omp parallel if (C * elements > PARALLEL)
  {
    Words words;
    Row noise(4 * COUNTERS), times(4 * COUNTERS);
#pragma omp for schedule(static)
    for (i64 piece = 0; piece < C * tiles; ++piece) {
      const i64 c = piece / tiles, tile = piece % tiles, first = tile * 4 * COUNTERS;
      const i64 size = smaller(4 * COUNTERS, elements - first), at = c * elements + first;
      draw(uint64_t(keys[c]), uint32_t(tile * COUNTERS), &words, noise);
      for (i64 i = 0; i < size;) {  // frame by frame
        const i64 frame = (first + i) / bins, end = smaller(size, (frame + 1) * bins - first);
        fill(times + i, t[c * t_c + frame * t_t], end - i);
        i = end;
      }
#pragma omp simd
      for (i64 i = 0; i < size; ++i) {
        const float value = to_float(x[at + i]), eps = sigma * noise[i], time = times[i];
        store(x_t + at + i, (1 - time) * eps + time * value);
        store(target + at + i, value - eps);
      }
    }
  }
}

}  // namespace

AGREPA_EXPORT(flow_mix)
