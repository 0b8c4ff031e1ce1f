// The gradient of a weight from channels_last to contiguous: as many transposed matrices as it has rows.
#pragma once

#include <cstdint>

namespace fastdcgan::cpu {

// Of so many taps: whole vectors of them. Of others PyTorch's copy is as fast.
bool can_reorder_taps(int64_t taps);

// [rows][taps][channels] to [rows][channels][taps].
void reorder_taps(const float* from, int64_t rows, int64_t taps, int64_t channels, float* to);

}  // namespace fastdcgan::cpu
