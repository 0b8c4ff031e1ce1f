// `conv` and `weight_grad` whose gathered side has few channels, such as those of an image. Products are short there, so
// nothing is gathered: the rows of the image that an output row reads are widened once, with their padding, and read as
// they lie.
#pragma once

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

// Whether they run a contraction: not a transposed one, with so few channels that one sum is a single piece.
bool can_image_side(const Contraction&);
void image_side_contract(
    const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);
void image_side_weight_grad(const Contraction&, c10::ScalarType, const void* gathered, const void* linear, void* out);

}  // namespace fastdcgan::cpu
