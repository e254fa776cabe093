// GELU of one element and its derivative, exact (erf) and tanh, in fp32. Without calls and branches, loops over a row
// vectorise. Every function is accurate to about 1 ulp of its value, or of 1 if it is a term of a sum with 1.
#pragma once
#include "common.h"

namespace {

// a if the sign bit of `test` is set, else b, by bit operations: compilers turn conditionals into branches, and loops
// with branches vectorise with AVX-512 only.
inline float where_negative(float test, float a, float b) {
  uint32_t t, x, y;
  __builtin_memcpy(&t, &test, 4);
  __builtin_memcpy(&x, &a, 4);
  __builtin_memcpy(&y, &b, 4);
  const uint32_t mask = uint32_t(int32_t(t) >> 31), bits = (x & mask) | (y & ~mask);
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}

// x, at most 87: exp(+-87) is a normal number.
inline float capped(float x) { return where_negative(87 - x, 87, x); }

// exp(x) for |x| <= 87: x = n ln2 + r, a polynomial in r (Cephes), times 2^n by its exponent bits.
inline float exponential(float x) {
  const float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const float shifted = x * 1.44269504f + MAGIC;
  const float n = shifted - MAGIC;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits << 23) + 0x3F800000;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return p * power;
}

// Phi(z), the normal distribution, given exp(-z^2 / 2): 1/2 + z R(z^2) for |z| < 1.25, beyond it from the tail
// exp(-z^2 / 2) t Q(t), t = 1 / (1 + 0.4 |z| / sqrt(2)). R and Q are minimax fits (absolute 2e-9, relative 4e-8).
inline float normal_cdf(float z, float bell) {
  const float size = __builtin_fabsf(z), square = z * z;
  float r = -6.64484696e-06f;
  r = r * square + 0.000110327404f;
  r = r * square + -0.00118270947f;
  r = r * square + 0.00997150037f;
  r = r * square + -0.0664899871f;
  r = r * square + 0.398942262f;
  const float t = 1 / (1 + 0.282842712f * size);
  float q = -0.0581642538f;
  q = q * t + 0.121886455f;
  q = q * t + 0.004048754f;
  q = q * t + 0.106566839f;
  q = q * t + 0.0993798599f;
  q = q * t + 0.113347888f;
  q = q * t + 0.112813421f;
  const float tail = bell * t * q;
  const float outside = where_negative(z, tail, 1 - tail);
  return where_negative(size - 1.25f, 0.5f + z * r, outside);
}

// tanh(u): an odd polynomial (Cephes) for |u| < 0.625, beyond it 1 - 2 / (exp(2 |u|) + 1).
inline float hyperbolic_tangent(float u) {
  const float size = __builtin_fabsf(u), square = u * u;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  const float outside = 1 - 2 / (exponential(capped(2 * size)) + 1);
  return where_negative(size - 0.625f, u + u * square * p, __builtin_copysignf(outside, u));
}

constexpr float SQRT_2_OVER_PI = 0.797884561f, CUBIC = 0.044715f;

template <bool TANH>
inline float gelu(float z) {
  if (TANH) return 0.5f * z * (1 + hyperbolic_tangent(SQRT_2_OVER_PI * (z + CUBIC * z * z * z)));
  return z * normal_cdf(z, exponential(-capped(0.5f * z * z)));
}

template <bool TANH>
inline float gelu_slope(float z) {
  if (TANH) {
    const float t = hyperbolic_tangent(SQRT_2_OVER_PI * (z + CUBIC * z * z * z));
    return 0.5f * (1 + t) + 0.5f * z * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * CUBIC * z * z);
  }
  const float bell = exponential(-capped(0.5f * z * z));
  return normal_cdf(z, bell) + z * bell * 0.398942280f;
}

}  // namespace
