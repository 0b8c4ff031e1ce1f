// `conv_transpose` to few channels: col2im_gemm.h.
#pragma once

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

// Whether it runs a contraction: a transposed one, whose products have at most half as many columns for each input pixel as
// those of the implicit GEMM.
bool can_col2im(const Contraction&);
void col2im_contract(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);

}  // namespace fastdcgan::cpu
