// `conv_transpose` to few channels, such as those of an image: every input pixel is multiplied by the weights of all taps
// at once, and the outputs add up what falls on them. The products of a band of rows stay in the cache.
#pragma once

#include "contractions.h"

namespace fastdcgan::cpu {

// Whether this is the faster way.
bool scatters(const Contraction&);
void scatter(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Finish&);

}  // namespace fastdcgan::cpu
