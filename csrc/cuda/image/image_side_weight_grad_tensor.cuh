// The weight gradient of an image-side layer on tensor cores: channels x pixels times pixels x (values of a patch).
//
// A block of 8 columns is two taps side by side of kMostImageChannels values each: where a kernel's row has an odd
// number of them, the last one's are multiplied for nobody. What tensor cores take from a pixel of the depth are 16
// bytes of the image, which lie at a multiple of as much if the first tap's pixel has an even number. For others there
// is the image once more, one pixel on.
#pragma once

#include "cuda/image/image_side_tensor.cuh"

namespace fastdcgan::cuda {

struct ImageSideWeightGradTensor {
  static constexpr int kThreads = 256, kResident = 2;
  static constexpr int kSide = 8, kTile = kSide * kSide;  // of a tile of pixels
  static constexpr int kChannels = 64;                    // of a block
  static constexpr int kPitch = kChannels + 8;            // neighbouring rows fall into other banks
  static constexpr int kWarpsM = kChannels / 16, kWarpsN = kThreads / 32 / kWarpsM;
  static constexpr int kMostBlocks = kMostKernel * ((kMostKernel + 1) / 2);  // of 8 columns
  static constexpr int kOfWarp = (kMostBlocks + kWarpsN - 1) / kWarpsN / 2 * 2;
  static_assert(kOfWarp * kWarpsN >= kMostBlocks, "two at a time");
  static constexpr int kColumns = kOfWarp * kWarpsN * 8;
  static constexpr int kRegion = most_under(kSide) * (most_under(kSide) + 1);

  template <class T>
  struct Tiles {
    alignas(16) T linear[kTile][kPitch];
    alignas(16) T region[2][kRegion][kMostImageChannels];  // from pixel 0 on, and from pixel 1
    alignas(16) T zeros[8];
  };
  template <class T>
  union Shared {
    Tiles<T> tiles;
    float sums[kChannels][kColumns];
  };
};

// As image_side_weight_grad (image_side_weight_grad.cuh), for numbers of 16 bits. A warp has 16 channels and every
// kWarpsN-th block of columns.
template <class T>
__global__ void __launch_bounds__(ImageSideWeightGradTensor::kThreads, ImageSideWeightGradTensor::kResident)
    image_side_weight_grad_tensor(const __grid_constant__ ImageSideOperand<T> x,
                                  const __grid_constant__ ImageSideOperand<T> linear,
                                  const __grid_constant__ ImageSideGeometry g, const __grid_constant__ ImageTiles tiles,
                                  int64_t share, float* __restrict__ partials) {
  gpu::await_kernels_before();
  using C = ImageSideWeightGradTensor;
  auto& shared = gpu::shared_memory<C::Shared<T>>();
  auto& staged = shared.tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
  const int warp_m = warp % C::kWarpsM * 16, warp_n = warp / C::kWarpsM;
  const int first = blockIdx.y * C::kChannels, across = (g.kernel_x + 1) / 2, blocks = g.kernel_y * across;
  const int rows = (C::kSide - 1) * g.stride_y + g.kernel_y;
  const int columns = ((C::kSide - 1) * g.stride_x + g.kernel_x + 2) / 2 * 2;  // even, and one for the odd tap

  // The rows of the right factor that this lane finds: of a pixel in column `step_x` of the tile and in every second
  // row, and the first or the second block of two.
  const int step_y = lane / 8 % 2, step_x = lane % 8, second = lane / 16;
  if (threadIdx.x < 8) staged.zeros[threadIdx.x] = gpu::from_float<T>(0.f);
  int shift[C::kOfWarp / 2];  // of those blocks' taps; negative where there is none
#pragma unroll
  for (int n = 0; n < C::kOfWarp; n += 2) {
    const int block = (n + second) * C::kWarpsN + warp_n;
    shift[n / 2] = block < blocks ? block / across * columns + block % across * 2 : -1;
  }

  float sum[C::kOfWarp][4] = {};
  const int64_t begin = blockIdx.x * share, end = begin + share < tiles.count ? begin + share : tiles.count;
  for (int64_t tile = begin; tile < end; ++tile) {
    const TilePlace place(tiles, tile);
    __syncthreads();  // all have done with the tile before
    stage_wide<C::kChannels, C::kPitch>(
        linear, place.image, first, 0, C::kTile, C::kSide, place.top, place.left, threadIdx.x, C::kThreads,
        staged.linear[0]);
    stage_pixels<C::kThreads>(x, place.image, place.top * g.stride_y - g.padding_y,
                              place.left * g.stride_x - g.padding_x, rows, columns,
                              [&](int row, int column, const auto& pixel) {
                                const int at = row * columns + column;
                                gpu::store(staged.region[0][at], pixel);
                                if (at > 0) gpu::store(staged.region[1][at - 1], pixel);
                              });
    __syncthreads();
#pragma unroll 1
    for (int step = 0; step < C::kTile / 16; ++step) {
      unsigned a[4];
      gpu::load_matrix_transposed(
          a, &staged.linear[step * 16 + lane / 16 * 8 + lane % 8][warp_m + lane / 8 % 2 * 8]);
      const int i = step * 2 + step_y;
      // What is beyond the tensor's edge counts for nothing, whatever the image has there.
      const bool inside = linear.inside(place.top + i, place.left + step_x);
      const int from = i * g.stride_y * columns + step_x * g.stride_x;
#pragma unroll
      for (int n = 0; n < C::kOfWarp; n += 2) {
        if (n * C::kWarpsN + warp_n >= blocks) continue;  // the same for a warp
        const int at = from + shift[n / 2];
        unsigned b[4];
        gpu::load_matrix_transposed(b, inside && shift[n / 2] >= 0 ? staged.region[at % 2][at / 2 * 2] : staged.zeros);
        const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        gpu::multiply_add(T{}, sum[n], a, b0);
        gpu::multiply_add(T{}, sum[n + 1], a, b1);
      }
    }
  }

  __syncthreads();  // the sums take the place of the tiles
#pragma unroll
  for (int n = 0; n < C::kOfWarp; ++n)
#pragma unroll
    for (int q = 0; q < 4; ++q)
      shared.sums[warp_m + q / 2 * 8 + line][(n * C::kWarpsN + warp_n) * 8 + pair + q % 2] = sum[n][q];
  __syncthreads();
  const int run = g.kernel_x * x.channels, values = g.kernel_y * run;
  for (int e = threadIdx.x; e < C::kChannels * values; e += C::kThreads) {
    const int c = first + e / values, k = e % values, kx = k % run / x.channels;
    const int column = (k / run * across + kx / 2) * 8 + kx % 2 * kMostImageChannels + k % x.channels;
    if (c < linear.channels)
      partials[(static_cast<int64_t>(blockIdx.x) * linear.channels + c) * values + k] = shared.sums[e / values][column];
  }
}

}  // namespace fastdcgan::cuda
