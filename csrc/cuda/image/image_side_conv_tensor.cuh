// The convolution of an image on tensor cores: pixels x (values of a patch) times (values of a patch) x channels.
//
// The order of the depth and of the columns is free, and is chosen so that nothing has to be laid out anew. A step of
// the depth is four taps of kMostImageChannels values: the four numbers that a thread brings for a row are one pixel of
// the image. The columns are dealt out so that a thread's sums of a pixel are runs of channels, which it stores as they
// are.
#pragma once

#include "cuda/image/image_side_tensor.cuh"

namespace fastdcgan::cuda {

struct ImageSideConvTensor {
  static constexpr int kThreads = 256, kResident = 2;
  static constexpr int kChannels = 64;  // of a block
  static constexpr int kOfWarp = ConvTile::kPixels / (kThreads / 32);
  static constexpr int kBlocksM = kOfWarp / 16, kBlocksN = kChannels / 8;
  static constexpr int kMostTaps = (kMostKernel * kMostKernel + 3) / 4 * 4;
  static constexpr int kPitch = kMostTaps * kMostImageChannels + 32;
  static_assert(kPitch % 64 == 16, "four rows of four threads fall into different banks");

  template <class T>
  struct Shared {
    alignas(16) T weights[kChannels][kPitch];
    alignas(16) T region[ConvTile::kRegion][kMostImageChannels];
    int offset[kMostTaps];  // of a tap's pixel in the region, -1 for those there aren't
  };

  // Four blocks of columns are 32 channels, of which a thread has 8: two in each.
  static GPU_INLINE int channel(int column) {
    return column / 32 * 32 + column % 8 / 2 * 8 + column / 8 % 4 * 2 + column % 2;
  }
};

// As image_side_conv (image_side_conv.cuh), for numbers of 16 bits.
template <class T>
__global__ void __launch_bounds__(ImageSideConvTensor::kThreads, ImageSideConvTensor::kResident)
    image_side_conv_tensor(const __grid_constant__ ImageSideOperand<T> x, const __grid_constant__ Weights<T> weight,
                       const __grid_constant__ ImageSideGeometry g, const __grid_constant__ ImageSideEpilogue epilogue,
                       const __grid_constant__ ImageTiles tiles, T* __restrict__ out, int height, int width,
                       int channels, bool vectors) {
  gpu::await_kernels_before();
  using C = ImageSideConvTensor;
  auto& shared = gpu::shared_memory<C::Shared<T>>();
  const int warp = threadIdx.x / 32, line = threadIdx.x % 32 / 4, part = threadIdx.x % 4;
  const int first = blockIdx.y * C::kChannels, taps = g.taps(), steps = (taps + 3) / 4,
            depth = steps * 4 * kMostImageChannels;
  const int rows = (tiles.rows - 1) * g.stride_y + g.kernel_y, columns = (tiles.columns - 1) * g.stride_x + g.kernel_x;

  for (RowsOf at(threadIdx.x, C::kThreads, depth); at.row < C::kChannels; at.advance()) {
    const int column = at.row, k = at.column, tap = k / kMostImageChannels, c = k % kMostImageChannels,
              o = first + C::channel(column);
    const bool there = tap < taps && c < x.channels && o < channels;
    shared.weights[column][k] = gpu::from_float<T>(there ? weight.at(o, c, tap / g.kernel_x, tap % g.kernel_x) : 0.f);
  }
  for (int tap = threadIdx.x; tap < steps * 4; tap += C::kThreads)
    shared.offset[tap] = tap < taps ? tap / g.kernel_x * columns + tap % g.kernel_x : -1;
  int base[C::kBlocksM][2];  // where a pixel's patch begins
#pragma unroll
  for (int m = 0; m < C::kBlocksM; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pixel = warp * C::kOfWarp + m * 16 + h * 8 + line;
      base[m][h] = pixel / tiles.columns * g.stride_y * columns + pixel % tiles.columns * g.stride_x;
    }

  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const TilePlace place(tiles, tile);
    __syncthreads();  // all have done with the region of the tile before
    stage_pixels<C::kThreads>(
        x, place.image, place.top * g.stride_y - g.padding_y, place.left * g.stride_x - g.padding_x, rows, columns,
        [&](int row, int column, const auto& pixel) { gpu::store(shared.region[row * columns + column], pixel); });
    __syncthreads();

    float sum[C::kBlocksM][C::kBlocksN][4] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int offset = shared.offset[step * 4 + part];
      unsigned a[C::kBlocksM][4] = {};
#pragma unroll
      for (int m = 0; m < C::kBlocksM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          unsigned pixel[2] = {};
          if (offset >= 0) gpu::load_pairs(pixel, shared.region[base[m][h] + offset]);
          a[m][h] = pixel[0], a[m][h + 2] = pixel[1];
        }
#pragma unroll
      for (int n = 0; n < C::kBlocksN; ++n) {
        unsigned b[2];
        gpu::load_pairs(b, &shared.weights[n * 8 + line][(step * 4 + part) * kMostImageChannels]);
#pragma unroll
        for (int m = 0; m < C::kBlocksM; ++m) gpu::multiply_add(T{}, sum[m][n], a[m], b);
      }
    }

    const int group = epilogue.groups > 1 ? place.image / (x.batch / epilogue.groups) : 0;
#pragma unroll
    for (int half = 0; half < C::kBlocksN / 4; ++half) {
      const int mine = first + half * 32 + part * kRun;
#pragma unroll
      for (int c = 0; c < kRun; ++c) {  // one after another: registers are few beside the sums
        float s, t;
        epilogue.coefficients(group, mine + c, channels, s, t);
#pragma unroll
        for (int m = 0; m < C::kBlocksM; ++m)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& of_pixel = sum[m][half * 4 + c / 2][h * 2 + c % 2];
            of_pixel = s * of_pixel + t;
          }
      }
#pragma unroll
      for (int m = 0; m < C::kBlocksM; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int pixel = warp * C::kOfWarp + m * 16 + h * 8 + line;
          const int i = place.top + pixel / tiles.columns, k = place.left + pixel % tiles.columns;
          if (i >= height || k >= width || mine >= channels) continue;
          float run[kRun];
#pragma unroll
          for (int c = 0; c < kRun; ++c) run[c] = sum[m][half * 4 + c / 2][h * 2 + c % 2];
          if (epilogue.kind == ImageSideEpilogue::activated) activate(epilogue.act, run);
          T* to = out + ((static_cast<int64_t>(place.image) * height + i) * width + k) * channels + mine;
          if (vectors) {
            gpu::write_floats(to, run);
            continue;
          }
#pragma unroll
          for (int c = 0; c < kRun; ++c)
            if (mine + c < channels) to[c] = gpu::from_float<T>(run[c]);
        }
    }
  }
}

}  // namespace fastdcgan::cuda
