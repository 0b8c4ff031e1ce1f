// The convolution of an image: 1 to 4 channels to many. The first layer of a discriminator, and the gradient of the
// input of a generator's last layer (with that layer's weights).
#pragma once

#include "cuda/image/image_side_conv_tensor.cuh"

namespace fastdcgan::cuda {

struct ImageSideConv {
  static constexpr int kThreads = 256, kResident = 4;
  static constexpr int kChannels = 64;                 // of a block
  static constexpr int kLanes = kChannels / kRun;      // threads side by side along them
  static constexpr int kAbreast = kThreads / kLanes;   // pixels that lie one beside the other
  static constexpr int kPixels = 8;                    // of a thread
  static_assert(kAbreast * kPixels == ConvTile::kPixels, "every thread has as many");
  static constexpr int kMostValues = kMostKernel * kMostKernel * kMostImageChannels;

  struct Shared {
    float weights[kMostValues][kChannels];
    float region[ConvTile::kRegion * kMostImageChannels];
  };
};

// grid (blocks that share the tiles, channels / kChannels rounded up); `out` [N, height, width, channels]
template <class T>
__global__ void __launch_bounds__(ImageSideConv::kThreads)
    image_side_conv(const __grid_constant__ ImageSideOperand<T> x, const __grid_constant__ Weights<T> weight,
                const __grid_constant__ ImageSideGeometry g, const __grid_constant__ ImageSideEpilogue epilogue,
                const __grid_constant__ ImageTiles tiles, T* __restrict__ out, int height, int width, int channels,
                bool vectors) {
  gpu::await_kernels_before();
  using C = ImageSideConv;
  auto& shared = gpu::shared_memory<C::Shared>();
  const int lane = threadIdx.x % C::kLanes, abreast = threadIdx.x / C::kLanes;
  const int first = blockIdx.y * C::kChannels, mine = first + lane * kRun;
  const int run = g.kernel_x * x.channels;  // values of a patch that lie together
  const int rows = (tiles.rows - 1) * g.stride_y + g.kernel_y, columns = (tiles.columns - 1) * g.stride_x + g.kernel_x;

  for (int e = threadIdx.x; e < g.kernel_y * run * C::kChannels; e += C::kThreads) {
    const int k = e / C::kChannels, o = e % C::kChannels, kx = k % run / x.channels;
    shared.weights[k][o] = first + o < channels ? weight.at(first + o, k % x.channels, k / run, kx) : 0.f;
  }
  int base[C::kPixels];  // where a pixel's patch begins
#pragma unroll
  for (int j = 0; j < C::kPixels; ++j) {
    const int pixel = abreast + j * C::kAbreast, row = pixel / tiles.columns, column = pixel % tiles.columns;
    base[j] = (row * g.stride_y * columns + column * g.stride_x) * x.channels;
  }

  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const TilePlace place(tiles, tile);
    __syncthreads();  // all have done with the region of the tile before
    stage_image<C::kThreads>(x, place.image, place.top * g.stride_y - g.padding_y,
                              place.left * g.stride_x - g.padding_x, rows, columns, shared.region);
    __syncthreads();

    float sum[C::kPixels][kRun] = {};
    for (int ky = 0; ky < g.kernel_y; ++ky) {
      const float* row = shared.region + ky * columns * x.channels;
      for (int r = 0; r < run; ++r) {
        float w[kRun];
        gpu::read_floats(&shared.weights[ky * run + r][lane * kRun], w);
#pragma unroll
        for (int j = 0; j < C::kPixels; ++j) {
          const float value = row[base[j] + r];
#pragma unroll
          for (int c = 0; c < kRun; ++c) sum[j][c] = fmaf(value, w[c], sum[j][c]);
        }
      }
    }

    const int group = epilogue.groups > 1 ? place.image / (x.batch / epilogue.groups) : 0;
#pragma unroll
    for (int j = 0; j < C::kPixels; ++j) {
      const int pixel = abreast + j * C::kAbreast;
      const int i = place.top + pixel / tiles.columns, k = place.left + pixel % tiles.columns;
      if (i >= height || k >= width || mine >= channels) continue;
      T* to = out + ((static_cast<int64_t>(place.image) * height + i) * width + k) * channels + mine;
      const bool whole = vectors && mine + kRun <= channels;
#pragma unroll
      for (int c = 0; c < kRun; ++c) {
        if (mine + c >= channels) continue;
        sum[j][c] = epilogue(sum[j][c], group, mine + c, channels);
        if (!whole) to[c] = gpu::from_float<T>(sum[j][c]);
      }
      if (whole) gpu::write_floats(to, sum[j]);
    }
  }
}

template <class T>
void launch_image_side_conv(const ImageSideOperand<T>& x, const Weights<T>& weight, const ImageSideGeometry& g,
                        const ImageSideEpilogue& epilogue, T* out, int height, int width, int channels, bool vectors,
                        gpu::Stream stream) {
  using C = std::conditional_t<sizeof(T) == 2, ImageSideConvTensor, ImageSideConv>;
  const ImageTiles tiles = ConvTile::over(x.batch, height, width);
  const int64_t across = (channels + C::kChannels - 1) / C::kChannels;
  const int64_t most = (int64_t{gpu::multiprocessors()} * C::kResident + across - 1) / across;
  const dim3 grid(static_cast<unsigned>(tiles.count < most ? tiles.count : most), static_cast<unsigned>(across));
  if constexpr (sizeof(T) == 2)
    gpu::launch_early(image_side_conv_tensor<T>,
                      {"image_side_conv_tensor", grid, C::kThreads, sizeof(typename C::template Shared<T>), stream}, x,
                      weight, g, epilogue, tiles, out, height, width, channels, vectors);
  else
    gpu::launch_early(image_side_conv<T>, {"image_side_conv", grid, C::kThreads, sizeof(typename C::Shared), stream}, x,
                      weight, g, epilogue, tiles, out, height, width, channels, vectors);
}

}  // namespace fastdcgan::cuda
