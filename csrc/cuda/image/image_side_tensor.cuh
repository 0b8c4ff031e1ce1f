// What the image-side kernels on tensor cores share: how the image comes to lie in shared memory.
#pragma once

#include "cuda/device/pairs.h"
#include "cuda/device/tensor_core.h"
#include "cuda/image/image_side.cuh"

namespace fastdcgan::cuda {

// The image under a tile, from (top, left) on: rows of pixels of kMostImageChannels numbers, those there aren't 0. So
// each pixel is one access of 8 bytes, and products cost the same for 1 to 4 channels. put(row, column, pixel) stores
// it.
template <int kThreads, class T, class Put>
GPU_INLINE void stage_pixels(const ImageSideOperand<T>& x, int image, int top, int left, int rows, int columns,
                             Put put) {
  for (RowsOf at(threadIdx.x, kThreads, columns); at.row < rows; at.advance()) {
    const int row = at.row, column = at.column;
    gpu::Vec<T, kMostImageChannels> pixel;
#pragma unroll
    for (int c = 0; c < kMostImageChannels; ++c)
      pixel[c] = gpu::from_float<T>(c < x.channels ? x.at(image, top + row, left + column, c) : 0.f);
    put(row, column, pixel);
  }
}

}  // namespace fastdcgan::cuda
