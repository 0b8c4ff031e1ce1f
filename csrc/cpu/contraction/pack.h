// A weight as panels of B: [panel][row of DepthOrder][column].
#pragma once

#include "cpu/contraction/contraction.h"
#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

// Elements of a packed weight.
template <class Products>
int64_t packed_size(const Contraction& c) {
  return Products::kTerms * Panels(c.out_channels).width * DepthOrder(c.y, c.x, c.in_channels, Products::kDepthUnit).rows();
}

void pack_weight(const Contraction&, c10::ScalarType, const Weight&, float* to);

}  // namespace fastdcgan::cpu
