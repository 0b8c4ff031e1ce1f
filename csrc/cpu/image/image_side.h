// `conv` and `weight_grad` whose gathered side has few channels, such as those of an image. Products are short there, so
// nothing is gathered: the rows of the image that an output row reads are widened once, with their padding, and read as
// they lie.
#pragma once

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

// Whether this is the faster way.
bool is_narrow(const Contraction&);
void narrow_contract(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Finish&);
void narrow_weight_grad(const Contraction&, c10::ScalarType, const void* gathered, const void* linear, void* out);

}  // namespace fastdcgan::cpu
