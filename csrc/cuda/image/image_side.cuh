// What the kernels of the image-side layers share: convolutions with 1 to 4 channels on one side and many on the other.
//
// Tensors of any dtype, sums in float. Tiles of both operands lie in shared memory, prologue applied and padded with
// zeros. Numbers of 16 bits are multiplied on tensor cores (image_side_*_tensor.cuh); floats on the plain ones, where
// every thread keeps a rectangle of sums in registers. The wide tensor moves in 16-byte accesses, and but for what
// neighbouring tiles share is read or written once.
#pragma once

#include "cuda/device/activation.h"
#include "cuda/device/floats.h"
#include "cuda/device/tensor_core.h"

namespace fastdcgan::cuda {

constexpr int kMostImageChannels = 4;      // channels at most
constexpr int kMostKernel = 5;  // rows and columns of the weights
constexpr int kMostStride = 2;
constexpr int kRun = 8;         // channels of the wide tensor that a thread of a convolution has

// Pixels of the larger image under a row of `pixels` of the smaller one, at most.
constexpr int most_under(int pixels) { return (pixels - 1) * kMostStride + kMostKernel; }

// The geometry of the convolution that goes from the larger image to the smaller one.
struct ImageSideGeometry {
  int kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x;

  GPU_HOST_INLINE int taps() const { return kernel_y * kernel_x; }
};

// A tensor [N, C, H, W] with any strides, or what is computed from it on load (`Operand` in
// fastdcgan/backends/base.py).
template <class T>
struct ImageSideOperand {
  const T* x;
  const T* y;         // null: act(s*x + t); else s*act'(s*y + t)*x [+ p*y + q]
  const float* coef;  // [rows, groups, C], or null: x
  int64_t step_n, step_h, step_w, step_c;
  int batch, channels, height, width;
  int rows, groups;  // of coef
  RuntimeActivation act;
  bool vectors;  // runs of channels lie together, at multiples of 16 bytes; those of coef too

  GPU_INLINE bool inside(int i, int j) const { return i >= 0 && i < height && j >= 0 && j < width; }
  // A tensor as it is, whose pixels lie together.
  GPU_INLINE bool plain() const { return coef == nullptr && step_c == 1 && step_w == channels; }
  GPU_INLINE int64_t offset(int image, int i, int j) const { return image * step_n + i * step_h + j * step_w; }

  // Those of N channels from `channel` on, of an image; p and q stay in memory, for registers are few.
  template <int N>
  struct Coefficients {
    const float* k;
    float s[N], t[N];

    GPU_INLINE Coefficients(const ImageSideOperand& o, int image, int channel)
        : k(o.coef + static_cast<int64_t>(image / (o.batch / o.groups)) * o.channels + channel) {
      gpu::read_floats(k, s), gpu::read_floats(k + static_cast<int64_t>(o.groups) * o.channels, t);
    }
  };

  // The prologue on N channels from `channel` on of a pixel: `values` are x's, and `from_y` is where y's are. More than
  // one channel only where `vectors`.
  template <int N>
  GPU_INLINE void map(int image, int channel, const T* from_y, float (&values)[N]) const {
    if (coef != nullptr) map(Coefficients<N>(*this, image, channel), from_y, values);
  }
  template <int N>
  GPU_INLINE void map(const Coefficients<N>& k, const T* from_y, float (&values)[N]) const {
    if (y == nullptr) {
#pragma unroll
      for (int c = 0; c < N; ++c) values[c] = k.s[c] * values[c] + k.t[c];
      return activate(act, values);
    }
    float other[N], z[N];
    gpu::read_floats(from_y, other);
#pragma unroll
    for (int c = 0; c < N; ++c) z[c] = k.s[c] * other[c] + k.t[c];
    differentiate(act, z);
#pragma unroll
    for (int c = 0; c < N; ++c) values[c] = k.s[c] * (values[c] * z[c]);
    if (rows != 4) return;
    const int64_t row = static_cast<int64_t>(groups) * channels;
    float p[N], q[N];
    gpu::read_floats(k.k + 2 * row, p), gpu::read_floats(k.k + 3 * row, q);
#pragma unroll
    for (int c = 0; c < N; ++c) values[c] += p[c] * other[c] + q[c];
  }

  // One value; 0 outside the image.
  GPU_INLINE float at(int image, int i, int j, int channel) const {
    if (!inside(i, j)) return 0.f;
    const int64_t o = offset(image, i, j) + channel * step_c;
    float one[1] = {gpu::to_float(x[o])};
    map(image, channel, y + o, one);
    return one[0];
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
struct ImageSideEpilogue {
  enum Kind : int { none, bias, activated };  // the first of EpilogueKind (gemm/epilogue.cuh)
  Kind kind;
  const float* coef;  // bias [C], or [rows, groups, C] of which (s, t) are the first
  int groups;
  RuntimeActivation act;

  GPU_INLINE float operator()(float sum, int group, int channel, int channels) const {
    if (kind == none) return sum;
    if (kind == bias) return sum + coef[channel];
    const float s = coef[static_cast<int64_t>(group) * channels + channel];
    const float t = coef[static_cast<int64_t>(groups + group) * channels + channel];
    float one[1] = {s * sum + t};
    activate(act, one);
    return one[0];
  }

  // It is the activation of s*sum + t with these.
  GPU_INLINE void coefficients(int group, int channel, int channels, float& s, float& t) const {
    s = 1.f, t = 0.f;
    if (kind == none || channel >= channels) return;
    if (kind == activated) s = coef[static_cast<int64_t>(group) * channels + channel];
    t = coef[(kind == bias ? 0 : static_cast<int64_t>(groups + group) * channels) + channel];
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

// Pixels of the smaller image that a block of a convolution computes at a time: as many columns as fit an image's best.
struct ConvTile {
  static constexpr int kPixels = 256;
  static constexpr int kFewestImageChannels = 8, kWidest = 32;  // columns
  static constexpr int kRegion =
      most_under(kPixels / kFewestImageChannels) * most_under(kFewestImageChannels);  // pixels under the longest one

  static ImageTiles over(int images, int height, int width) {
    int columns = kFewestImageChannels;
    while (columns < kWidest && columns < width) columns *= 2;
    return ImageTiles::over(images, height, width, kPixels / columns, columns);
  }
};

// One axis of the input's region under a tile of `pixels` pixels of one phase of a transposed convolution.
struct TransposeAxis {
  int stride, padding, taps, region;

  TransposeAxis(int kernel, int stride_, int padding_, int pixels) : stride(stride_), padding(padding_) {
    taps = (kernel + stride - 1) / stride;
    region = pixels + taps - 1 + (stride - 1 + padding) / stride - padding / stride;
  }
  // The region's first pixel, of a tile that begins at pixel `first` of a phase.
  GPU_INLINE int begin(int first) const { return first + padding / stride - (taps - 1); }
  GPU_INLINE int first_tap(int phase) const { return (phase + padding) % stride; }
  // Where the first tap's pixel is in the region, seen from the tile's pixel.
  GPU_INLINE int shift(int phase) const { return (phase + padding) / stride - padding / stride + taps - 1; }
};

// Number `first` of what lies in rows of `columns`, and then every `by`-th: without more divisions.
struct RowsOf {
  int row, column, columns, rows_on, columns_on;

  GPU_INLINE RowsOf(int first, int by, int columns_)
      : row(first / columns_), column(first % columns_), columns(columns_), rows_on(by / columns_),
        columns_on(by % columns_) {}
  GPU_INLINE void advance() {
    row += rows_on, column += columns_on;
    if (column >= columns) column -= columns, ++row;
  }
};

// kChannels channels from `first` on of `count` pixels as rows of kPitch numbers: those from number `begin` on of rows of
// `columns` pixels, whose first is (top, left). By the threads that call it, of which this is number `thread` of `threads`.
template <int kChannels, int kPitch, class T>
GPU_INLINE void stage_wide(const ImageSideOperand<T>& x, int image, int first, int begin, int count, int columns, int top,
                           int left, int thread, int threads, T* to) {
  if (!x.vectors) {
#pragma unroll 1
    for (int e = thread; e < count * kChannels; e += threads) {
      const int pixel = e / kChannels, c = e % kChannels, i = top + (begin + pixel) / columns;
      const int j = left + (begin + pixel) % columns;
      to[pixel * kPitch + c] = gpu::from_float<T>(first + c < x.channels ? x.at(image, i, j, first + c) : 0.f);
    }
    return;
  }
  // A thread keeps to its channels.
  constexpr int kRun = gpu::kVec<T>, kRuns = kChannels / kRun;
  const int c = thread % kRuns * kRun, step = threads / kRuns;
  const bool mine = first + c < x.channels;
  to += c;
  RowsOf at(begin + thread / kRuns, step, columns);
  for (int pixel = thread / kRuns; pixel < count; pixel += step, at.advance()) {
    const int i = top + at.row, j = left + at.column;
    const bool there = x.inside(i, j) && mine;
    gpu::copy_async(to + pixel * kPitch, there ? x.x + x.offset(image, i, j) + first + c : x.x, there);
  }
  gpu::copy_async_commit();
  gpu::copy_async_wait<0>();
  if (x.coef == nullptr || !mine) return;
  const typename ImageSideOperand<T>::template Coefficients<kRun> coefficients(x, image, first + c);
  at = RowsOf(begin + thread / kRuns, step, columns);
#pragma unroll 1
  for (int pixel = thread / kRuns; pixel < count; pixel += step, at.advance()) {  // what this thread has copied
    const int i = top + at.row, j = left + at.column;
    if (!x.inside(i, j)) continue;
    float values[kRun];
    gpu::read_floats(to + pixel * kPitch, values);
    x.map(coefficients, x.y + x.offset(image, i, j) + first + c, values);
    gpu::write_floats(to + pixel * kPitch, values);
  }
}

// Rows of the image under a tile: `columns` pixels of all (few) channels, from (top, left) on.
template <int kThreads, class T>
GPU_INLINE void stage_image(const ImageSideOperand<T>& x, int image, int top, int left, int rows, int columns,
                            float* region) {
  const int row = columns * x.channels;
  if (!x.plain()) {
    for (int e = threadIdx.x; e < rows * row; e += kThreads)
      region[e] = x.at(image, top + e / row, left + e % row / x.channels, e % x.channels);
    return;
  }
  // A row of the region is one of the image: a warp for each, without a division.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = left * x.channels, end = x.width * x.channels;
  for (int r = warp; r < rows; r += kThreads / 32) {
    const int i = top + r;
    const bool inside = i >= 0 && i < x.height;
    const T* from = x.x + x.offset(image, inside ? i : 0, 0);
    for (int e = lane; e < row; e += 32) {
      const int at = begin + e;
      region[r * row + e] = inside && at >= 0 && at < end ? gpu::to_float(from[at]) : 0.f;
    }
  }
}

}  // namespace fastdcgan::cuda
