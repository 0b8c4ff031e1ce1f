#include "cpu/bf16/avx512_bf16.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastdcgan::cpu::avx512_bf16 {

#if defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__)

bool usable() {
  static const bool found = [] {
    constexpr unsigned int kBFloat16 = 1u << 5;  // of EAX, leaf 7, subleaf 1
    unsigned int a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBFloat16);
  }();
  return found;
}

#else

bool usable() { return false; }

#endif

}  // namespace fastdcgan::cpu::avx512_bf16
