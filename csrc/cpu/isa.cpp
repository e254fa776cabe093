// The instruction set this machine runs: 0 generic, 1 AVX2 with FMA, 2 AVX-512 (F, DQ, BW, VL).
extern "C" __attribute__((visibility("default"))) int agrepa_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}
