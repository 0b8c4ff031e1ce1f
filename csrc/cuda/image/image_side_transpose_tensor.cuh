// The transposed convolution to an image on tensor cores: pixels x channels times channels x (taps x image's channels).
//
// Every pixel of the wide tensor is multiplied once, with all taps. The products of a region of pixels lie in shared
// memory, where each pixel of the image then finds those that it is the sum of.
#pragma once

#include "cuda/image/image_side_tensor.cuh"

namespace fastdcgan::cuda {

struct ImageSideTransposeTensor {
  static constexpr int kThreads = 256, kResident = 2, kWarps = kThreads / 32;
  static constexpr int kMostRows = 8, kColumns = 32;  // a tile, in pixels of one phase
  static constexpr int kChannels = 64;                // that are multiplied at a time
  static constexpr int kStaged = kChannels + 8;       // neighbouring rows fall into other banks; likewise the next
  static constexpr int kBlocksM = 3, kOfWarp = kBlocksM * 16;  // pixels that a warp multiplies at a time
  static_assert(kThreads / (kColumns * kMostStride) % kMostStride == 0, "a thread has rows of one phase");
  static constexpr size_t kMostBytes = 112 * 1024;    // of shared memory, so that kResident blocks have room

  struct Plan {
    TransposeAxis axis_y, axis_x;
    ImageTiles tiles;
    int blocks;  // of 8 columns of products
    int pitch;   // of a pixel's
    bool apart;  // pixels are staged apart from the products, to which several parts of the channels add

    // The plan for images with phases of height x width pixels and `channels` channels, from `wide` channels. The
    // tallest tile that takes no more than `most` bytes, or one of a single row.
    Plan(int images, int height, int width, int channels, int wide, const ImageSideGeometry& g, size_t most)
        : axis_y(g.kernel_y, g.stride_y, g.padding_y, kMostRows), axis_x(g.kernel_x, g.stride_x, g.padding_x, kColumns),
          tiles(ImageTiles::over(images, height, width, kMostRows, kColumns)), blocks((g.taps() * channels + 7) / 8),
          apart(wide > kChannels) {
      // An odd number of blocks: neighbouring pixels fall into other banks. As long as a staged pixel at least.
      const int least = (kStaged / 2 + 7) / 8;
      pitch = ((blocks > least ? blocks : least) | 1) * 8;
      for (int rows = kMostRows / 2; rows > 0 && shared_bytes() > most; rows /= 2) {
        axis_y = TransposeAxis(g.kernel_y, g.stride_y, g.padding_y, rows);
        tiles = ImageTiles::over(images, height, width, rows, kColumns);
      }
    }
    GPU_HOST_INLINE int pixels() const { return axis_y.region * axis_x.region; }
    GPU_HOST_INLINE int weights() const { return blocks * 8 * kStaged; }
    GPU_HOST_INLINE int products() const { return pixels() * pitch; }
    size_t shared_bytes() const {
      return static_cast<size_t>(weights()) * 2 + static_cast<size_t>(products()) * 4 +
             (apart ? static_cast<size_t>(kThreads / 32 * kOfWarp) * kStaged * 2 : 0);
    }
  };
};

// As image_side_transpose (image_side_transpose.cuh), for numbers of 16 bits. grid (blocks that share the tiles)
template <class T, int CO>
__global__ void __launch_bounds__(ImageSideTransposeTensor::kThreads, ImageSideTransposeTensor::kResident)
    image_side_transpose_tensor(const __grid_constant__ ImageSideOperand<T> x,
                                const __grid_constant__ Weights<T> weight, const __grid_constant__ ImageSideGeometry g,
                                const __grid_constant__ ImageSideTransposeTensor::Plan plan,
                                const __grid_constant__ ImageSideEpilogue epilogue, T* __restrict__ out, int height,
                                int width, int64_t step_n, int64_t step_h, int64_t step_w, int64_t step_c) {
  gpu::await_kernels_before();
  using C = ImageSideTransposeTensor;
  // The weights [taps x CO, channels], then the products [pixels, pitch].
  T* weights = &gpu::shared_memory<T>();
  float* products = reinterpret_cast<float*>(weights + plan.weights());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = lane / 4, pair = lane % 4 * 2;
  const int pixels = plan.pixels(), pitch = plan.pitch, region = plan.axis_x.region, values = g.taps() * CO;

  // A thread has one column of a tile of the image, and rows of one phase.
  const int tile_rows = plan.tiles.rows * g.stride_y, tile_columns = C::kColumns * g.stride_x;
  const int column = threadIdx.x % tile_columns, phase_x = column % g.stride_x;
  const int first_of_all = threadIdx.x / tile_columns, step = C::kThreads / tile_columns;  // rows
  const int phase_y = first_of_all % g.stride_y, first_of_phase = first_of_all / g.stride_y;
  const int step_of_phase = step / g.stride_y;
  const int first_ky = plan.axis_y.first_tap(phase_y), first_kx = plan.axis_x.first_tap(phase_x);
  const int shift_y = plan.axis_y.shift(phase_y), from_x = column / g.stride_x + plan.axis_x.shift(phase_x);

  for (int64_t tile = blockIdx.x; tile < plan.tiles.count; tile += gridDim.x) {
    const TilePlace place(plan.tiles, tile);
    const int top = plan.axis_y.begin(place.top), left = plan.axis_x.begin(place.left);
    for (int first = 0; first < x.channels; first += C::kChannels) {
      __syncthreads();  // all have done with the weights and products before
      // The weights of all channels, where these are all, stay for the tiles that follow.
      const bool stays = x.channels <= C::kChannels && tile != blockIdx.x;
      for (int e = threadIdx.x; !stays && e < plan.blocks * 8 * C::kChannels; e += C::kThreads) {
        const int c = e % C::kChannels, k = e / C::kChannels, tap = k / CO;
        const bool there = k < values && first + c < x.channels;
        const float w = there ? weight.at(first + c, k % CO, tap / g.kernel_x, tap % g.kernel_x) : 0.f;
        weights[k * C::kStaged + c] = gpu::from_float<T>(w);
      }
      __syncthreads();

      for (int begin = warp * C::kOfWarp; begin < pixels; begin += C::kWarps * C::kOfWarp) {
        const int count = pixels - begin < C::kOfWarp ? pixels - begin : C::kOfWarp;
        // A warp's pixels are staged where their products come, or apart.
        T* staged = plan.apart ? reinterpret_cast<T*>(products + plan.products()) + warp * C::kOfWarp * C::kStaged
                               : reinterpret_cast<T*>(products + begin * pitch);
        stage_wide<C::kChannels, C::kStaged>(x, place.image, first, begin, count, region, top, left, lane, 32, staged);
        __syncwarp();
        unsigned a[C::kBlocksM][C::kChannels / 16][4];
#pragma unroll
        for (int m = 0; m < C::kBlocksM; ++m) {
          const int row = m * 16 + lane % 16;
          const T* from = staged + (row < count ? row : 0) * C::kStaged + lane / 16 * 8;
#pragma unroll
          for (int k = 0; k < C::kChannels / 16; ++k) gpu::load_matrix(a[m][k], from + k * 16);
        }
        __syncwarp();  // all have read what the products take the place of
        for (int n = 0; n < plan.blocks; ++n) {
          float sum[C::kBlocksM][4] = {};
          const T* from = weights + (n * 8 + lane % 8) * C::kStaged + lane / 8 * 8;
#pragma unroll
          for (int k = 0; k < C::kChannels / 32; ++k) {
            unsigned b[4];
            gpu::load_matrix(b, from + k * 32);
            const unsigned b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < C::kBlocksM; ++m) {
              gpu::multiply_add(T{}, sum[m], a[m][k * 2], b0);
              gpu::multiply_add(T{}, sum[m], a[m][k * 2 + 1], b1);
            }
          }
#pragma unroll
          for (int m = 0; m < C::kBlocksM; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int pixel = m * 16 + h * 8 + line;
              if (pixel >= count) continue;
              float* to = products + (begin + pixel) * pitch + n * 8 + pair;
              gpu::Vec<float, 2> both{{sum[m][h * 2], sum[m][h * 2 + 1]}};
              if (first > 0) {
                const auto before = gpu::load<2>(to);
                both[0] += before[0], both[1] += before[1];
              }
              gpu::store(to, both);
            }
        }
      }
    }
    __syncthreads();

    const int group = epilogue.groups > 1 ? place.image / (x.batch / epilogue.groups) : 0;
    const int k = place.left * g.stride_x + column;
    int first_row = (first_of_phase + shift_y) * region + from_x;
    for (int row = first_of_all; row < tile_rows; row += step, first_row += step_of_phase * region) {
      const int i = place.top * g.stride_y + row;
      if (i >= height || k >= width) continue;
      int from = first_row;
      float total[CO] = {};
      for (int ky = first_ky; ky < g.kernel_y; ky += g.stride_y, from -= region)
        for (int kx = first_kx, pixel = from; kx < g.kernel_x; kx += g.stride_x, --pixel) {
          const float* product = products + pixel * pitch + (ky * g.kernel_x + kx) * CO;
#pragma unroll
          for (int o = 0; o < CO; ++o) total[o] += product[o];
        }
      T* to = out + place.image * step_n + i * step_h + k * step_w;
#pragma unroll
      for (int o = 0; o < CO; ++o) to[o * step_c] = gpu::from_float<T>(epilogue(total[o], group, o, CO));
    }
  }
}

}  // namespace fastdcgan::cuda
