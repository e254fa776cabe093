// velocity_change: kernels/velocity_change.py has the formula. Strides are in elements: _v over variants, _c over
// clips.
#include "common.h"

namespace {

template <class T>
void velocity_change(
    const T* variants,  // (V, C, T, M), clips contiguous
    const T* base,  // (C, T, M), clips contiguous
    const i64* lengths,  // (C,), or null: all frames are valid
    float* squares,  // (V + 1, C, pieces), sums over `piece` elements of the base, then of each variant minus it
    i64 V, i64 C, i64 frames, i64 bins, i64 piece, i64 variants_v, i64 variants_c, i64 base_c) {
  const i64 pieces = (frames * bins + piece - 1) / piece;
#pragma omp parallel if (V * C * frames * bins > PARALLEL)
  {
    Row buffer(piece);
#pragma omp for schedule(static)
    for (i64 i = 0; i < C * pieces; ++i) {
      const i64 c = i / pieces, first = i % pieces * piece;
      const i64 valid = lengths == nullptr ? frames : smaller(lengths[c], frames);
      const i64 size = smaller(piece, valid * bins - first);  // below 0 in padding
      const float* v0 = as_float(base + c * base_c + first, buffer, size);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (i64 e = 0; e < size; ++e) sum += v0[e] * v0[e];
      squares[i] = sum;
      for (i64 v = 0; v < V; ++v) {
        const T* variant = variants + v * variants_v + c * variants_c + first;
        sum = 0;
#pragma omp simd reduction(+ : sum)
        for (i64 e = 0; e < size; ++e) sum += (to_float(variant[e]) - v0[e]) * (to_float(variant[e]) - v0[e]);
        squares[(v + 1) * C * pieces + i] = sum;
      }
    }
  }
}

}  // namespace

AGREPA_EXPORT(velocity_change)
