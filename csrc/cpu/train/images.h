// uint8 images [N, H, W, C] to numbers in [-1, 1]: x / 127.5 - 1 in float, rounded to the output's dtype.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace fastdcgan::cpu {

struct ImageShape {
  int64_t images, height, width, channels;
};

// `out` has the order of `pixels`: [N, H, W, C]. `flip` [N], where given, says which images are mirrored left to right.
void images_pass(const ImageShape&, const uint8_t* pixels, const bool* flip, void* out, c10::ScalarType dtype);

}  // namespace fastdcgan::cpu
