// The contractions on AMX tiles, where the library is one for processors with AVX-512.
#pragma once

#include "cpu/contraction/contraction.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__)
#define FASTDCGAN_AMX

namespace fastdcgan::cpu {

// Of bfloat16, which the dtype has to be.
void amx_contract(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);
void amx_col2im(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);
void amx_weight_grad(const Contraction&, c10::ScalarType, const void* gathered, const void* linear, void* out);

// Of float, as three products of bfloat16 (split_bf16.h), for a weight whose storage is given. False if that gives no
// result: what is multiplied is infinite, NaN or too large.
bool split_bf16_contract(const Contraction&, const void* in, const Weight&, void* out, const Epilogue&);
bool split_bf16_weight_grad(const Contraction&, const void* gathered, const void* linear, void* out);

}  // namespace fastdcgan::cpu

#endif
