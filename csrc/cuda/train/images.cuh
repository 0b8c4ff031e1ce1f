// uint8 images [N, H, W, C] to numbers in [-1, 1] in the same order, some of them mirrored left to right.
#pragma once

#include "cuda/device/vec.h"

namespace fastdcgan::cuda {

struct Images {
  static constexpr int kThreads = 256;
  static constexpr int kVector = 16;  // pixels' channels of a thread: one access of 16 bytes
};

struct ImageShape {
  int64_t images;
  int height, width, channels;

  GPU_HOST_INLINE int row() const { return width * channels; }
  GPU_HOST_INLINE int64_t image() const { return static_cast<int64_t>(height) * row(); }
};

// In float, as x / 127.5f - 1.f is on the CPU.
template <class T>
GPU_INLINE T normalised(uint8_t level) {
  return gpu::from_float<T>(static_cast<float>(level) / 127.5f - 1.f);
}

// Each thread writes N values from a multiple of N on, all of one image. `flip` [N], or null.
template <class T, int N>
__global__ void __launch_bounds__(Images::kThreads)
    images(const uint8_t* __restrict__ pixels, const bool* __restrict__ flip, const __grid_constant__ ImageShape s,
           T* __restrict__ out) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * Images::kThreads + threadIdx.x) * N;
  gpu::await_kernels_before();
  if (at >= s.images * s.image()) return;
  const int64_t image = at / s.image(), begin = image * s.image();
  T values[N];
  if (flip == nullptr || !flip[image]) {
    const auto levels = gpu::load<N>(pixels + at);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = normalised<T>(levels[i]);
  } else {
    const int inside = static_cast<int>(at - begin), column = inside % s.row();
    const uint8_t* row = pixels + at - column;
    int x = column / s.channels, channel = column % s.channels;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values[i] = normalised<T>(row[(s.width - 1 - x) * s.channels + channel]);
      if (++channel == s.channels) {
        channel = 0;
        if (++x == s.width) x = 0, row += s.row();
      }
    }
  }
  constexpr int kAtOnce = N < gpu::kVec<T> ? N : gpu::kVec<T>;
#pragma unroll
  for (int j = 0; j < N; j += kAtOnce) {
    gpu::Vec<T, kAtOnce> some;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) some[i] = values[j + i];
    gpu::store(out + at + j, some);
  }
}

template <class T, int N>
void launch_images(const ImageShape& s, const uint8_t* pixels, const bool* flip, T* out, gpu::Stream stream) {
  constexpr int kOfBlock = Images::kThreads * N;
  const int64_t blocks = (s.images * s.image() + kOfBlock - 1) / kOfBlock;
  gpu::launch_early(images<T, N>, {"images", dim3(static_cast<unsigned>(blocks)), Images::kThreads, 0, stream}, pixels,
                    flip, s, out);
}

template <class T>
void images_pass(const ImageShape& s, const uint8_t* pixels, const bool* flip, T* out, gpu::Stream stream) {
  if (s.images * s.image() == 0) return;
  if (gpu::aligned(pixels) && gpu::aligned(out) && s.image() % Images::kVector == 0) {
    launch_images<T, Images::kVector>(s, pixels, flip, out, stream);
  } else {
    launch_images<T, 1>(s, pixels, flip, out, stream);
  }
}

}  // namespace fastdcgan::cuda
