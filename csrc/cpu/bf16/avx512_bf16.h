// AVX512_BF16: VDPBF16PS adds the products of two pairs of bfloat16 to a float, in each lane of a vector. Nothing else
// in csrc/cpu names an instruction of it.
//
// With FASTDCGAN_BF16_EMULATED the same functions are those of tests/csrc/cpu/avx512_bf16_emulated.h, for any processor
// with AVX-512.
#pragma once

#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu::avx512_bf16 {

// Whether this processor has the instruction (asked once).
bool usable();

}  // namespace fastdcgan::cpu::avx512_bf16

#ifdef CPU_CAPABILITY_AVX512
#ifdef FASTDCGAN_BF16_EMULATED
#include "avx512_bf16_emulated.h"
#else

namespace fastdcgan::cpu::avx512_bf16 {

// sum + a.second * b.second + a.first * b.first, where floats are pairs. A plain instruction, because the compilers'
// own function needs flags under which they would use the extension elsewhere too.
inline Floats dot(Floats sum, Floats a, Floats b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

}  // namespace fastdcgan::cpu::avx512_bf16

#endif
#endif
