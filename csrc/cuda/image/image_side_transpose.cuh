// The transposed convolution to an image: many channels to 1 to 4. The last layer of a generator, and the gradient of
// the input of a discriminator's first layer (with that layer's weights).
//
// Output pixel s*i + f of an axis sees the taps (f + p) % s + s*j, from input pixel i + (f + p)/s - j. All pixels of
// one phase (fy, fx) see the same taps, so a warp computes pixels of one phase; it shares their channels with other
// warps.
#pragma once

#include "cuda/image/image_side_transpose_tensor.cuh"

namespace fastdcgan::cuda {

struct ImageSideTranspose {
  static constexpr int kRows = 8, kColumns = 32;  // a tile, in pixels of one phase
  static constexpr int kPixels = 8;               // of a thread, each kAbreast columns after the one before
  static constexpr int kAbreast = kColumns / kPixels;
  static constexpr int kOfPhase = kRows * kAbreast;  // threads: a warp
  static constexpr int kMostThreads = 256;
  static constexpr int kChannels = 16;            // that are in shared memory at a time
  static constexpr int kSlice = 4;                // of which a thread takes so many at once
  static constexpr int kSlices = kChannels / kSlice;
  static constexpr int kPadded = kChannels + 4;   // neighbouring pixels fall into other banks
  static constexpr int kRegion = (kRows + kMostKernel - 1) * (kColumns + kMostKernel - 1);
  static constexpr int kMostTaps = kMostKernel * kMostKernel;
  static constexpr int kMostSums = kMostThreads * kPixels * kMostImageChannels;

  union Tile {
    float region[kRegion][kPadded];
    float sums[kMostSums];  // [shares, rows, columns, channels of the output's tile]
  };
  struct Shared {
    Tile tile;
    float weights[kChannels][kMostTaps][kMostImageChannels];
  };
};

// grid (tiles); block: shares of the channels x phases x a warp. `out` has any strides.
template <class T, int CO>
__global__ void __launch_bounds__(ImageSideTranspose::kMostThreads, 2)
    image_side_transpose(const __grid_constant__ ImageSideOperand<T> x, const __grid_constant__ Weights<T> weight,
                         const __grid_constant__ ImageSideGeometry g, const __grid_constant__ TransposeAxis axis_y,
                         const __grid_constant__ TransposeAxis axis_x,
                         const __grid_constant__ ImageSideEpilogue epilogue, const __grid_constant__ ImageTiles tiles,
                         T* __restrict__ out, int height, int width, int64_t step_n, int64_t step_h, int64_t step_w,
                         int64_t step_c) {
  gpu::await_kernels_before();
  using C = ImageSideTranspose;
  auto& shared = gpu::shared_memory<C::Shared>();
  const int threads = blockDim.x, phases = g.stride_y * g.stride_x, shares = threads / C::kOfPhase / phases;
  const int phase = threadIdx.x / C::kOfPhase % phases, share = threadIdx.x / C::kOfPhase / phases;
  const int phase_y = phase / g.stride_x, phase_x = phase % g.stride_x;
  const int row = threadIdx.x % C::kOfPhase / C::kAbreast, column = threadIdx.x % C::kAbreast;
  const TilePlace place(tiles, blockIdx.x);
  const int top = axis_y.begin(place.top), left = axis_x.begin(place.left);
  const int from = (row + axis_y.shift(phase_y)) * axis_x.region + column + axis_x.shift(phase_x);

  float sum[C::kPixels][CO] = {};
  for (int first = 0; first < x.channels; first += C::kChannels) {
    __syncthreads();  // all have done with the channels before
    stage_wide<C::kChannels, C::kPadded>(
        x, place.image, first, 0, axis_y.region * axis_x.region, axis_x.region, top, left, threadIdx.x, threads,
        shared.tile.region[0]);
    for (int e = threadIdx.x; e < C::kChannels * g.taps(); e += threads) {
      const int tap = e % g.taps(), c = e / g.taps();
#pragma unroll
      for (int o = 0; o < CO; ++o)
        shared.weights[c][tap][o] =
            first + c < x.channels ? weight.at(first + c, o, tap / g.kernel_x, tap % g.kernel_x) : 0.f;
    }
    __syncthreads();

    for (int ky = axis_y.first_tap(phase_y), back_y = 0; ky < g.kernel_y; ky += g.stride_y, ++back_y)
      for (int kx = axis_x.first_tap(phase_x), back_x = 0; kx < g.kernel_x; kx += g.stride_x, ++back_x) {
        const int pixel = from - back_y * axis_x.region - back_x, tap = ky * g.kernel_x + kx;
        for (int slice = share; slice < C::kSlices; slice += shares) {
          float values[C::kPixels][C::kSlice];
#pragma unroll
          for (int j = 0; j < C::kPixels; ++j)
            gpu::read_floats(&shared.tile.region[pixel + j * C::kAbreast][slice * C::kSlice], values[j]);
#pragma unroll
          for (int c = 0; c < C::kSlice; ++c) {
            const float* w = shared.weights[slice * C::kSlice + c][tap];
#pragma unroll
            for (int o = 0; o < CO; ++o) {
              const float factor = w[o];
#pragma unroll
              for (int j = 0; j < C::kPixels; ++j) sum[j][o] = fmaf(values[j][c], factor, sum[j][o]);
            }
          }
        }
      }
  }

  // The shares, side by side as the tile lies in the image; then added up in order, and stored along the rows.
  const int tile_rows = C::kRows * g.stride_y, tile_columns = C::kColumns * g.stride_x;
  __syncthreads();  // the sums take the place of the region
#pragma unroll
  for (int j = 0; j < C::kPixels; ++j) {
    const int i = row * g.stride_y + phase_y, k = (column + j * C::kAbreast) * g.stride_x + phase_x;
#pragma unroll
    for (int o = 0; o < CO; ++o) shared.tile.sums[((share * tile_rows + i) * tile_columns + k) * CO + o] = sum[j][o];
  }
  __syncthreads();
  const int group = epilogue.groups > 1 ? place.image / (x.batch / epilogue.groups) : 0;
  const int size = tile_rows * tile_columns * CO;
  for (int e = threadIdx.x; e < size; e += threads) {
    const int o = e % CO, i = place.top * g.stride_y + e / CO / tile_columns;
    const int k = place.left * g.stride_x + e / CO % tile_columns;
    if (i >= height || k >= width) continue;
    float total = shared.tile.sums[e];
    for (int s = 1; s < shares; ++s) total += shared.tile.sums[s * size + e];
    out[place.image * step_n + i * step_h + k * step_w + o * step_c] =
        gpu::from_float<T>(epilogue(total, group, o, CO));
  }
}

template <class T, int CO>
void launch_image_side_transpose(const ImageSideOperand<T>& x, const Weights<T>& weight, const ImageSideGeometry& g,
                                 const ImageSideEpilogue& epilogue, T* out, int height, int width,
                                 const int64_t (&steps)[4], gpu::Stream stream) {
  using C = ImageSideTranspose;
  const auto divided = [](int a, int b) { return (a + b - 1) / b; };
  const int phase_height = divided(height, g.stride_y), phase_width = divided(width, g.stride_x);
  if constexpr (sizeof(T) == 2) {
    using Tensor = ImageSideTransposeTensor;
    const size_t room = gpu::most_shared_bytes(), wanted = room < Tensor::kMostBytes ? room : Tensor::kMostBytes;
    const Tensor::Plan p(x.batch, phase_height, phase_width, CO, x.channels, g, wanted);
    const int64_t most = int64_t{gpu::multiprocessors()} * Tensor::kResident;
    const dim3 grid(static_cast<unsigned>(p.tiles.count < most ? p.tiles.count : most));
    gpu::launch_early(image_side_transpose_tensor<T, CO>,
                      {"image_side_transpose_tensor", grid, Tensor::kThreads, p.shared_bytes(), stream}, x, weight, g,
                      p, epilogue, out, height, width, steps[0], steps[1], steps[2], steps[3]);
  } else {
    const ImageTiles tiles = ImageTiles::over(x.batch, phase_height, phase_width, C::kRows, C::kColumns);
    const TransposeAxis axis_y(g.kernel_y, g.stride_y, g.padding_y, C::kRows);
    const TransposeAxis axis_x(g.kernel_x, g.stride_x, g.padding_x, C::kColumns);
    const int phases = g.stride_y * g.stride_x, most = C::kMostThreads / (phases * C::kOfPhase);
    const int threads = phases * C::kOfPhase * (most < C::kSlices ? most : C::kSlices);
    const dim3 grid(static_cast<unsigned>(tiles.count));
    gpu::launch_early(image_side_transpose<T, CO>,
                      {"image_side_transpose", grid, dim3(threads), sizeof(C::Shared), stream}, x, weight, g, axis_y,
                      axis_x, epilogue, tiles, out, height, width, steps[0], steps[1], steps[2], steps[3]);
  }
}

}  // namespace fastdcgan::cuda
