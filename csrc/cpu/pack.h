// A weight as panels of B: [panel][tap place][input channel][column], see tap_place.
#pragma once

#include "contractions.h"
#include "gemm.h"

namespace fastdcgan::cpu {

// Elements of a packed weight.
inline int64_t packed_size(const Contraction& c) {
  return Panels(c.out_channels).width * c.taps() * c.in_channels;
}

void pack_weight(const Contraction&, c10::ScalarType, const Weight&, float* to);

}  // namespace fastdcgan::cpu
