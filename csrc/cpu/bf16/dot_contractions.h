// The contractions by VDPBF16PS, where the library is one for processors with AVX-512. The tensors have to be of
// bfloat16.
#pragma once

#include "cpu/contraction/contraction.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__)
#define FASTDCGAN_AVX512_BF16

namespace fastdcgan::cpu {

void dot_contract(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);
void dot_col2im(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);
void dot_weight_grad(const Contraction&, c10::ScalarType, const void* gathered, const void* linear, void* out);

}  // namespace fastdcgan::cpu

#endif
