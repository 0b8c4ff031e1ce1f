// The weight gradient where the gathered side is an image: every block sums over its share of the pixels, and a second
// kernel adds the blocks' sums up, in order. No atomics: the same bits on every run.
#pragma once

#include "cuda/image/image_side_weight_grad_tensor.cuh"

namespace fastdcgan::cuda {

struct ImageSideWeightGrad {
  static constexpr int kThreads = 256, kResident = 2;
  static constexpr int kChannels = 64;           // of a block
  static constexpr int kSide = 8;                // of a tile of pixels
  static constexpr int kTile = kSide * kSide;
  static constexpr int kRegionSide = most_under(kSide);
  static constexpr int kMostRun = kMostKernel * kMostImageChannels;
  static constexpr int kMostValues = kMostKernel * kMostRun;

  struct Tiles {
    float linear[kTile][kChannels];
    float region[kRegionSide * kRegionSide * kMostImageChannels +
                 kMostRun];  // the last patches' rows are read to the end of a run
  };
  union Shared {
    Tiles tiles;
    float sums[kChannels][kMostValues];
  };
  // Channels of a thread: so many that its sums, `run` for each, stay in registers.
  static constexpr int own(int run) { return run <= 12 ? 8 : 4; }
  // Blocks that are meant to be resident: ptxas, left to itself, spills to reach more.
  static constexpr int resident(int run) { return own(run) * run >= 80 ? 1 : 2; }
};

// A thread sums for some channels and one row of the kernel, whose `kernel_x * channels` values (at most kRunSize) lie
// together in the image. grid (shares of the tiles, channels / kChannels rounded up); `partials` [shares, channels,
// values]
template <class T, int kRunSize>
__global__ void __launch_bounds__(ImageSideWeightGrad::kThreads, ImageSideWeightGrad::resident(kRunSize))
    image_side_weight_grad(const __grid_constant__ ImageSideOperand<T> x,
                           const __grid_constant__ ImageSideOperand<T> linear,
                           const __grid_constant__ ImageSideGeometry g, const __grid_constant__ ImageTiles tiles,
                           int64_t share, float* __restrict__ partials) {
  gpu::await_kernels_before();
  using C = ImageSideWeightGrad;
  constexpr int kOwn = C::own(kRunSize), kLanes = C::kChannels / kOwn;
  auto& shared = gpu::shared_memory<C::Shared>();
  const int lane = threadIdx.x % kLanes, ky = threadIdx.x / kLanes % g.kernel_y;
  const int team = threadIdx.x / kLanes / g.kernel_y, teams = C::kThreads / kLanes / g.kernel_y;  // share the pixels
  const int first = blockIdx.y * C::kChannels, run = g.kernel_x * x.channels, values = g.kernel_y * run;
  const int rows = (C::kSide - 1) * g.stride_y + g.kernel_y, columns = (C::kSide - 1) * g.stride_x + g.kernel_x;

  float sum[kOwn][kRunSize] = {};
  const int64_t begin = blockIdx.x * share, end = begin + share < tiles.count ? begin + share : tiles.count;
  for (int64_t tile = begin; tile < end; ++tile) {
    const TilePlace place(tiles, tile);
    __syncthreads();  // all have done with the tile before
    stage_wide<C::kChannels, C::kChannels>(
        linear, place.image, first, 0, C::kTile, C::kSide, place.top, place.left, threadIdx.x, C::kThreads,
        shared.tiles.linear[0]);
    stage_image<C::kThreads>(x, place.image, place.top * g.stride_y - g.padding_y,
                              place.left * g.stride_x - g.padding_x, rows, columns, shared.tiles.region);
    __syncthreads();
    if (team >= teams) continue;  // the threads that are left over stage, no more
    for (int pixel = team; pixel < C::kTile; pixel += teams) {
      const int i = pixel / C::kSide, k = pixel % C::kSide;
      if (!linear.inside(place.top + i, place.left + k)) continue;
      float own[kOwn];
      gpu::read_floats(&shared.tiles.linear[pixel][lane * kOwn], own);
      const float* patch = shared.tiles.region + ((i * g.stride_y + ky) * columns + k * g.stride_x) * x.channels;
#pragma unroll
      for (int r = 0; r < kRunSize; ++r) {  // what comes after `run` is summed for nobody
        const float value = patch[r];
#pragma unroll
        for (int c = 0; c < kOwn; ++c) sum[c][r] = fmaf(own[c], value, sum[c][r]);
      }
    }
  }

  __syncthreads();  // the sums take the place of the tiles
  for (int turn = 0; turn < teams; ++turn) {
    if (team == turn) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c)
#pragma unroll
        for (int r = 0; r < kRunSize; ++r) {
          if (r >= run) continue;
          float& all = shared.sums[lane * kOwn + c][ky * run + r];
          all = turn == 0 ? sum[c][r] : all + sum[c][r];
        }
    }
    __syncthreads();
  }
  for (int e = threadIdx.x; e < C::kChannels * values; e += C::kThreads) {
    const int c = first + e / values;
    if (c < linear.channels)
      partials[(static_cast<int64_t>(blockIdx.x) * linear.channels + c) * values + e % values] =
          shared.sums[e / values][e % values];
  }
}

struct CombineWeightGrad {
  static constexpr int kAbreast = 32, kStrands = 8;  // values of a block; threads that share the parts of each
  static constexpr int kThreads = kAbreast * kStrands;

  struct Shared {
    double sums[kStrands][kAbreast];
  };
};

// dw [channels, image_channels, kernel_y, kernel_x] of any strides from `partials` [shares, channels, values].
template <class T>
__global__ void __launch_bounds__(CombineWeightGrad::kThreads)
    combine_weight_grad(const float* __restrict__ partials, int shares, int channels, int image_channels,
                        const __grid_constant__ ImageSideGeometry g, T* __restrict__ dw, int64_t step_a, int64_t step_b,
                        int64_t step_y, int64_t step_x) {
  gpu::await_kernels_before();
  using C = CombineWeightGrad;
  auto& shared = gpu::shared_memory<C::Shared>();
  const int abreast = threadIdx.x % C::kAbreast, strand = threadIdx.x / C::kAbreast;
  const int64_t values = g.taps() * image_channels, size = channels * values;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * C::kAbreast + abreast;
  double total = 0;
  if (e < size) {
#pragma unroll 8
    for (int s = strand; s < shares; s += C::kStrands) total += partials[s * size + e];
  }
  shared.sums[strand][abreast] = total;
  __syncthreads();
  if (strand != 0 || e >= size) return;
#pragma unroll
  for (int s = 1; s < C::kStrands; ++s) total += shared.sums[s][abreast];
  const int k = static_cast<int>(e % values), ky = k / (g.kernel_x * image_channels);
  const int kx = k / image_channels % g.kernel_x;
  dw[e / values * step_a + k % image_channels * step_b + ky * step_y + kx * step_x] =
      gpu::from_float<T>(static_cast<float>(total));
}

template <class T, class Allocate>
void image_side_weight_grad_pass(const ImageSideOperand<T>& x, const ImageSideOperand<T>& linear,
                                 const ImageSideGeometry& g, Allocate allocate, T* dw, const int64_t (&steps)[4],
                                 gpu::Stream stream) {
  using C = std::conditional_t<sizeof(T) == 2, ImageSideWeightGradTensor, ImageSideWeightGrad>;
  const ImageTiles tiles = ImageTiles::over(x.batch, linear.height, linear.width, C::kSide, C::kSide);
  const int64_t across = (linear.channels + C::kChannels - 1) / C::kChannels;
  const int64_t wanted = (int64_t{gpu::multiprocessors()} * C::kResident + across - 1) / across;
  const int64_t share = (tiles.count + wanted - 1) / wanted, shares = (tiles.count + share - 1) / share;
  const int64_t size = int64_t{linear.channels} * x.channels * g.taps();
  float* partials = allocate(shares * size);
  const dim3 grid(static_cast<unsigned>(shares), static_cast<unsigned>(across));
  if constexpr (sizeof(T) == 2) {
    gpu::launch_early(
        image_side_weight_grad_tensor<T>,
        {"image_side_weight_grad_tensor", grid, C::kThreads, sizeof(typename C::template Shared<T>), stream}, x, linear,
        g, tiles, share, partials);
  } else {
    const auto launch = [&](auto run) {
      gpu::launch_early(image_side_weight_grad<T, decltype(run)::value>,
                        {"image_side_weight_grad", grid, C::kThreads, sizeof(typename C::Shared), stream}, x, linear, g,
                        tiles, share, partials);
    };
    const int run = g.kernel_x * x.channels;
    if (run <= 4) launch(std::integral_constant<int, 4>{});
    else if (run <= 8) launch(std::integral_constant<int, 8>{});
    else if (run <= 12) launch(std::integral_constant<int, 12>{});
    else if (run <= 16) launch(std::integral_constant<int, 16>{});
    else launch(std::integral_constant<int, C::kMostRun>{});
  }
  using Combine = CombineWeightGrad;
  const dim3 combine_grid(static_cast<unsigned>((size + Combine::kAbreast - 1) / Combine::kAbreast));
  gpu::launch_early(
      combine_weight_grad<T>, {"combine_weight_grad", combine_grid, Combine::kThreads, sizeof(Combine::Shared), stream},
      partials, static_cast<int>(shares), linear.channels, x.channels, g, dw, steps[0], steps[1], steps[2], steps[3]);
}

}  // namespace fastdcgan::cuda
