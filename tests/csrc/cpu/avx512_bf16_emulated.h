// VDPBF16PS of csrc/cpu/bf16/avx512_bf16.h by AVX-512's other instructions, as Intel's manual has it: two fused
// multiply-adds, the product of the second (upper) numbers first; denormal numbers are zeros, those that are read and
// those that come out; rounding to nearest, ties to even. AMD's manual gives no order; the same is assumed there.
#pragma once

#include <immintrin.h>

#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu::avx512_bf16::emulated {

// Denormal numbers are zeros of their sign.
inline __m512 flushed(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 normal = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  return _mm512_castsi512_ps(
      _mm512_mask_mov_epi32(_mm512_and_si512(bits, _mm512_set1_epi32(INT32_MIN)), normal, bits));
}

inline Floats dot(Floats sum, Floats a, Floats b) {
  const auto first = [](Floats x) { return flushed(_mm512_castsi512_ps(_mm512_slli_epi32(__m512i(x), 16))); };
  const auto second = [](Floats x) {
    return flushed(_mm512_castsi512_ps(_mm512_and_si512(__m512i(x), _mm512_set1_epi32(-65536))));
  };
  const __m512 upper = flushed(_mm512_fmadd_ps(second(a), second(b), flushed(__m512(sum))));
  return Floats(flushed(_mm512_fmadd_ps(first(a), first(b), upper)));
}

}  // namespace fastdcgan::cpu::avx512_bf16::emulated

namespace fastdcgan::cpu::avx512_bf16 {
#ifdef FASTDCGAN_BF16_EMULATED
using emulated::dot;
#endif
}  // namespace fastdcgan::cpu::avx512_bf16
