// What the kernels of the image-side layers share: convolutions with 1 to 4 channels on one side and many on the other.
//
// Tensors of any dtype, float products and sums. Tiles of both operands lie in shared memory as floats, prologue applied
// and padded with zeros; every thread keeps a rectangle of sums in registers. The wide tensor moves in 16-byte accesses,
// and but for what neighbouring tiles share is read or written once.
#pragma once

#include "common/activations.h"
#include "device/floats.h"

namespace fastdcgan::cuda {

constexpr int kNarrow = 4;      // channels at most
constexpr int kMostKernel = 5;  // rows and columns of the weights
constexpr int kMostStride = 2;
constexpr int kRun = 8;         // channels of the wide tensor that a thread moves at once

// Pixels of the larger image under a row of `pixels` of the smaller one, at most.
constexpr int most_under(int pixels) { return (pixels - 1) * kMostStride + kMostKernel; }

// Of the convolution that goes from the larger image to the smaller one.
struct NarrowGeometry {
  int kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x;

  GPU_HOST_INLINE int taps() const { return kernel_y * kernel_x; }
};

GPU_INLINE float activate(int id, float slope, float z) {
  switch (static_cast<ActId>(id)) {
    case ActId::relu: return ReLU<float>(slope).forward(z);
    case ActId::leaky_relu: return LeakyReLU<float>(slope).forward(z);
    case ActId::tanh: return Tanh<float>(slope).forward(z);
    case ActId::sigmoid: return Sigmoid<float>(slope).forward(z);
    case ActId::silu: return SiLU<float>(slope).forward(z);
    case ActId::gelu: return GELU<float>(slope).forward(z);
    case ActId::elu: return ELU<float>(slope).forward(z);
    default: return z;
  }
}

GPU_INLINE float activation_derivative(int id, float slope, float z) {
  switch (static_cast<ActId>(id)) {
    case ActId::relu: return ReLU<float>(slope).derivative(z);
    case ActId::leaky_relu: return LeakyReLU<float>(slope).derivative(z);
    case ActId::tanh: return Tanh<float>(slope).derivative(z);
    case ActId::sigmoid: return Sigmoid<float>(slope).derivative(z);
    case ActId::silu: return SiLU<float>(slope).derivative(z);
    case ActId::gelu: return GELU<float>(slope).derivative(z);
    case ActId::elu: return ELU<float>(slope).derivative(z);
    default: return 1.f;
  }
}

// A tensor [N, C, H, W] with any strides, or what is computed from it on load (`Operand` in fastdcgan/backends/base.py).
template <class T>
struct Source {
  const T* x;
  const T* y;         // null: act(s*x + t); else s*act'(s*y + t)*x [+ p*y + q]
  const float* coef;  // [rows, groups, C], or null: x
  int64_t step_n, step_h, step_w, step_c;
  int batch, channels, height, width;
  int rows, groups;  // of coef
  int act;
  float slope;
  bool vectors;  // runs of channels lie together, at multiples of 16 bytes

  GPU_INLINE bool inside(int i, int j) const { return i >= 0 && i < height && j >= 0 && j < width; }
  // A tensor as it is, whose pixels lie together.
  GPU_INLINE bool plain() const { return coef == nullptr && step_c == 1 && step_w == channels; }
  GPU_INLINE int64_t offset(int image, int i, int j) const { return image * step_n + i * step_h + j * step_w; }

  GPU_INLINE float value(float from_x, float from_y, int image, int channel) const {
    if (coef == nullptr) return from_x;
    const int64_t row = static_cast<int64_t>(groups) * channels;
    const float* k = coef + static_cast<int64_t>(image / (batch / groups)) * channels + channel;
    const float s = k[0], t = k[row];
    if (y == nullptr) return activate(act, slope, s * from_x + t);
    const float g = s * (from_x * activation_derivative(act, slope, s * from_y + t));
    return rows == 4 ? g + (k[2 * row] * from_y + k[3 * row]) : g;
  }

  // One value; 0 outside the image.
  GPU_INLINE float at(int image, int i, int j, int channel) const {
    if (!inside(i, j)) return 0.f;
    const int64_t o = offset(image, i, j) + channel * step_c;
    return value(gpu::to_float(x[o]), y != nullptr ? gpu::to_float(y[o]) : 0.f, image, channel);
  }

  // Channels from `first` on; 0 outside the image and beyond the last channel.
  GPU_INLINE void run(int image, int i, int j, int first, float (&out)[kRun]) const {
    if (vectors && inside(i, j) && first + kRun <= channels) {
      const int64_t o = offset(image, i, j) + first;
      float other[kRun] = {};
      gpu::read_floats(x + o, out);
      if (y != nullptr) gpu::read_floats(y + o, other);
      if (coef == nullptr) return;
#pragma unroll
      for (int c = 0; c < kRun; ++c) out[c] = value(out[c], other[c], image, first + c);
      return;
    }
#pragma unroll
    for (int c = 0; c < kRun; ++c) out[c] = first + c < channels ? at(image, i, j, first + c) : 0.f;
  }
};

// Weights [a, b, kernel_y, kernel_x] with any strides.
template <class T>
struct Weights {
  const T* w;
  int64_t step_a, step_b, step_y, step_x;

  GPU_INLINE float at(int a, int b, int ky, int kx) const {
    return gpu::to_float(w[a * step_a + b * step_b + ky * step_y + kx * step_x]);
  }
};

// What is done to a sum before it is stored (`Epilogue` in fastdcgan/backends/base.py).
struct NarrowEpilogue {
  enum Kind : int { none, bias, activated };
  Kind kind;
  const float* coef;  // bias [C], or [rows, groups, C] of which (s, t) are the first
  int groups;
  int act;
  float slope;

  GPU_INLINE float operator()(float sum, int group, int channel, int channels) const {
    if (kind == none) return sum;
    if (kind == bias) return sum + coef[channel];
    const float s = coef[static_cast<int64_t>(group) * channels + channel];
    const float t = coef[static_cast<int64_t>(groups + group) * channels + channel];
    return activate(act, slope, s * sum + t);
  }
};

// Tiles of `rows` x `columns` pixels of every image of a tensor.
struct ImageTiles {
  int rows, columns, across, of_image;
  int64_t count;

  static ImageTiles over(int images, int height, int width, int rows, int columns) {
    const int across = (width + columns - 1) / columns, of_image = across * ((height + rows - 1) / rows);
    return {rows, columns, across, of_image, static_cast<int64_t>(images) * of_image};
  }
};

struct TilePlace {
  int image, top, left;

  GPU_INLINE TilePlace(const ImageTiles& t, int64_t tile)
      : image(static_cast<int>(tile / t.of_image)),
        top(static_cast<int>(tile % t.of_image) / t.across * t.rows),
        left(static_cast<int>(tile % t.of_image) % t.across * t.columns) {}
};

// Rows of the image under a tile: `columns` pixels of all (few) channels, from (top, left) on.
template <int kThreads, class T>
GPU_INLINE void stage_narrow(const Source<T>& x, int image, int top, int left, int rows, int columns, float* box) {
  const int row = columns * x.channels;
  if (!x.plain()) {
    for (int e = threadIdx.x; e < rows * row; e += kThreads)
      box[e] = x.at(image, top + e / row, left + e % row / x.channels, e % x.channels);
    return;
  }
  // A row of the box is one of the image: a warp for each, without a division.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = left * x.channels, end = x.width * x.channels;
  for (int r = warp; r < rows; r += kThreads / 32) {
    const int i = top + r;
    const bool inside = i >= 0 && i < x.height;
    const T* from = x.x + x.offset(image, inside ? i : 0, 0);
    for (int e = lane; e < row; e += 32) {
      const int at = begin + e;
      box[r * row + e] = inside && at >= 0 && at < end ? gpu::to_float(from[at]) : 0.f;
    }
  }
}

}  // namespace fastdcgan::cuda
