// `conv_transpose` to few channels: scattered.h.
#pragma once

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

// Whether this is the faster way.
bool scatters(const Contraction&);
void scatter(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Finish&);

}  // namespace fastdcgan::cpu
