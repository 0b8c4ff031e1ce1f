// The gradient of a weight from channels_last to contiguous.
#pragma once

#include <cstdint>

namespace fastdcgan::cpu {

// Whether `contiguous` takes weights of so many taps: whole vectors of them. Of others PyTorch's copy is as fast.
bool can_contiguous(int64_t taps);

// [rows][taps][channels] to [rows][channels][taps].
void contiguous(const float* from, int64_t rows, int64_t taps, int64_t channels, float* to);

}  // namespace fastdcgan::cpu
