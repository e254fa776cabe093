// Picks the instruction set that this machine runs: 0 generic, 1 x86-64-v3, 2 x86-64-v4. setup.py names these levels to
// the compiler, which may use any instruction of a level. A virtual machine may mask a single feature, so every feature
// is tested, by CPUID: g++ before 12 and clang before 17 cannot test a level by its name.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr unsigned bit(int number) { return 1u << number; }

// Bits of CPUID leaf 1 ECX: SSE3, SSSE3, FMA, CMPXCHG16B; SSE4.1, SSE4.2, MOVBE, POPCNT; XSAVE, OSXSAVE, AVX, F16C.
constexpr unsigned V3_LEAF1 = bit(0) | bit(9) | bit(12) | bit(13) | bit(19) | bit(20) | bit(22) | bit(23) | bit(26) |
                              bit(27) | bit(28) | bit(29);
// CPUID leaf 7 EBX: BMI1, AVX2, BMI2; AVX-512 F, DQ, CD, BW, VL.
constexpr unsigned V3_LEAF7 = bit(3) | bit(5) | bit(8);
constexpr unsigned V4_LEAF7 = V3_LEAF7 | bit(16) | bit(17) | bit(28) | bit(30) | bit(31);
// CPUID leaf 0x80000001 ECX: LAHF, LZCNT.
constexpr unsigned V3_EXTENDED = bit(0) | bit(5);
// XCR0, the registers that the operating system saves: SSE, AVX; masks and both halves of the 512-bit registers.
constexpr unsigned V3_SAVED = bit(1) | bit(2);
constexpr unsigned V4_SAVED = V3_SAVED | bit(5) | bit(6) | bit(7);

bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }

}  // namespace

// The instruction set of a machine with these four words of features. Tests mask single bits.
EXPORTED int agrepa_isa_of(unsigned leaf1, unsigned leaf7, unsigned extended, unsigned saved) {
  if (!has(leaf1, V3_LEAF1) || !has(leaf7, V3_LEAF7) || !has(extended, V3_EXTENDED) || !has(saved, V3_SAVED)) return 0;
  return has(leaf7, V4_LEAF7) && has(saved, V4_SAVED) ? 2 : 1;
}

EXPORTED int agrepa_isa() {
#if defined(__x86_64__)
  unsigned leaf1 = 0, leaf7 = 0, extended = 0, saved = 0, a, b, c, d;
  __get_cpuid(1, &a, &b, &leaf1, &d);
  __get_cpuid_count(7, 0, &a, &leaf7, &c, &d);
  __get_cpuid(0x80000001, &a, &b, &extended, &d);
  if (has(leaf1, bit(27))) __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  return agrepa_isa_of(leaf1, leaf7, extended, saved);
#else
  return 0;
#endif
}
