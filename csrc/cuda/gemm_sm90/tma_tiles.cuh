// Where the TMA tiles of pixels lie that a contraction for sm_90a copies, step by step of its depth: as loaders.cuh,
// but a tile is a block of images, rows and columns of the output (of weight_grad: of the linear operand), which a tap
// shifts.
//
// With a stride the gathered tensor [N, H, W, C] is seen as [N, H/sh, sh, W/sw, sw*C]: every tap is a dense tile of
// that.
#pragma once

#include "cuda/device/tensor_map.h"
#include "cuda/gemm/loaders.cuh"

namespace fastdcgan::cuda {

struct PixelTile {
  int images = 1, rows = 1, columns = 1;
};

// A problem, and its tensors as the copy engine takes them.
template <class T>
struct TmaProblem {
  gpu::TensorMap left, left_y, right, right_y;
  Problem<T> p;
  PixelTile tma_tile, tiles;  // pixels of a TMA tile along each, and tiles (of a group, or phase)
  int row_bits = 0, column_bits = 0;  // of the TMA tile's sides, powers of two
  Divider stride_y, stride_x, batch;
  int stages = 0;
  gpu::Hang* hang = nullptr;

  void set_tma_tile(const PixelTile& tile) {
    tma_tile = tile;
    while (1 << row_bits < tile.rows) ++row_bits;
    while (1 << column_bits < tile.columns) ++column_bits;
  }
};

// A shift by `offset` pixels, of which a step to the next output pixel is `stride`: whole steps and the rest.
struct Shift {
  int steps, rest;
  GPU_INLINE Shift(int offset, const Divider& stride) {
    const int sign = offset >> 31;  // the floor of a negative quotient: ~(~offset / stride)
    steps = stride(offset ^ sign) ^ sign;
    rest = offset - steps * static_cast<int>(stride.divisor);
  }
};

// conv and conv_transpose. `C` is a Sm90Contraction.
template <class C>
class TmaPixelLoader : public PixelSteps<C> {
 public:
  using T = typename C::T;
  using typename PixelSteps<C>::Step;

  GPU_INLINE explicit TmaPixelLoader(const TmaProblem<T>& w) : PixelSteps<C>(w.p), w_(w) {
    first_r_ = block_.tile % w.tiles.columns * w.tma_tile.columns;
    first_q_ = block_.tile / w.tiles.columns % w.tiles.rows * w.tma_tile.rows;
    first_n_ = block_.group * w.p.batch + block_.tile / w.tiles.columns / w.tiles.rows * w.tma_tile.images;
  }

  // Has the tensor maps of the copies fetched, by one thread; before the wait, since they are parameters.
  static GPU_INLINE void prefetch(const TmaProblem<T>& w) {
    gpu::prefetch_tensor_map(w.left), gpu::prefetch_tensor_map(w.right);
    if (w.p.gathered.y != nullptr) gpu::prefetch_tensor_map(w.left_y);
  }

  // Begins the copies of a step, by one thread.
  GPU_INLINE void load(unsigned char* stage, gpu::Mbarrier* full, const Step& step) const {
    const Shift y(rows_.origin + step.y * rows_.step, w_.stride_y);
    const Shift x(columns_.origin + step.x * columns_.step, w_.stride_x);
    const int at[] = {step.channel + x.rest * p_.gathered.channels, first_r_ + x.steps, y.rest, first_q_ + y.steps,
                       first_n_};
    gpu::copy_tma_tile(stage, w_.left, full, at);
    stage += C::kLeftBytes;
    if (p_.gathered.y != nullptr) {
      gpu::copy_tma_tile(stage, w_.left_y, full, at);
      stage += C::kLeftBytes;
    }
    const int tap = this->tap(step);
    if constexpr (C::kOp == Op::conv) {
      gpu::copy_tma_tile(stage, w_.right, full, {step.channel, tap, block_.first_channel});
    } else {
#pragma unroll
      for (int n = 0; n < C::kN; n += 64)
        gpu::copy_tma_tile(stage + n / 64 * C::kPanel, w_.right, full, {block_.first_channel + n, tap, step.channel});
    }
  }

  // Where the results go; by the threads from `thread` on of C::kConsumers.
  GPU_INLINE void find_place(TilePlace<C::kM>& place, int thread) const {
    for (int row = thread; row < C::kM; row += C::kConsumers) {
      int n, q, r;
      locate(row, n, q, r);
      const bool inside = n < (block_.group + 1) * p_.batch && q < rows_.pixels && r < columns_.pixels;
      place.pixel[row] = inside ? this->output_pixel(n, q, r) : -1;
    }
    if (thread == 0) this->set_place(place);
  }

  GPU_INLINE int group() const { return block_.group; }

  // The gathered pixel of a row of the tile before its shift, and whether it lies in the tensor after it.
  struct Pixel {
    int y, x;
  };
  GPU_INLINE Pixel pixel(int row) const {
    int n, q, r;
    locate(row, n, q, r);
    return {q * rows_.stride + rows_.origin, r * columns_.stride + columns_.origin};
  }
  GPU_INLINE bool inside(const Pixel& pixel, const Step& step) const {
    const int y = pixel.y + step.y * rows_.step, x = pixel.x + step.x * columns_.step;
    return y >= 0 && y < p_.rows.size && x >= 0 && x < p_.columns.size;
  }

 private:
  using PixelSteps<C>::p_, PixelSteps<C>::block_, PixelSteps<C>::rows_, PixelSteps<C>::columns_;

  GPU_INLINE void locate(int row, int& n, int& q, int& r) const {
    r = first_r_ + row % w_.tma_tile.columns, row /= w_.tma_tile.columns;
    q = first_q_ + row % w_.tma_tile.rows, n = first_n_ + row / w_.tma_tile.rows;
  }

  const TmaProblem<T>& w_;
  int first_n_, first_q_, first_r_;
};

// weight_grad: the depth is taken in TMA tiles of C::kK pixels of the linear operand's grid, which they fill.
template <class C>
class TmaChannelLoader : public ChannelPlace<C> {
 public:
  using T = typename C::T;
  struct Step {
    int n, q, r;  // first image, row, column
  };

  GPU_INLINE explicit TmaChannelLoader(const TmaProblem<T>& w) : ChannelPlace<C>(w.p), w_(w) {
    const Share share(w.tiles.images * w.tiles.rows * w.tiles.columns, w.p.splits);
    steps = share.steps;
    const int line = share.first / w.tiles.columns;
    start_ = {line / w.tiles.rows * w.tma_tile.images, line % w.tiles.rows * w.tma_tile.rows,
              share.first % w.tiles.columns * w.tma_tile.columns};
  }

  int steps;

  GPU_INLINE Step first() const { return start_; }
  GPU_INLINE void advance(Step& step) const {
    step.r += w_.tma_tile.columns;
    if (step.r < w_.p.columns.pixels) return;
    step.r = 0, step.q += w_.tma_tile.rows;
    if (step.q < w_.p.rows.pixels) return;
    step.q = 0, step.n += w_.tma_tile.images;
  }

  static GPU_INLINE void prefetch(const TmaProblem<T>& w) {
    gpu::prefetch_tensor_map(w.left), gpu::prefetch_tensor_map(w.right);
    if (w.p.other.y != nullptr) gpu::prefetch_tensor_map(w.left_y);
    if (w.p.gathered.y != nullptr) gpu::prefetch_tensor_map(w.right_y);
  }

  GPU_INLINE void load(unsigned char* stage, gpu::Mbarrier* full, const Step& step) const {
    const Problem<T>& p = w_.p;
    const auto left = [&](const gpu::TensorMap& map) {
#pragma unroll
      for (int m = 0; m < C::kM; m += 64, stage += C::kPanel)
        gpu::copy_tma_tile(stage, map, full, {first_m_ + m, step.r, 0, step.q, step.n});
    };
    left(w_.left);
    if (p.other.y != nullptr) left(w_.left_y);
    const Shift y(dy_, w_.stride_y), x(dx_, w_.stride_x);
    const auto right = [&](const gpu::TensorMap& map) {
#pragma unroll
      for (int n = 0; n < C::kN; n += 64, stage += C::kPanel)
        gpu::copy_tma_tile(stage, map, full, {first_n_ + n + x.rest * p.gathered.channels, step.r + x.steps, y.rest,
                                         step.q + y.steps, step.n});
    };
    right(w_.right);
    if (p.gathered.y != nullptr) right(w_.right_y);
  }

  // Applies the prologues of both operands in place to a stage that is there.
  GPU_INLINE void transform(unsigned char* stage, const Step& step, int thread) const {
    const Problem<T>& p = w_.p;
    const int images = p.groups * p.batch;
    if (p.other.prologue != Prologue::none)
      transform<C::kM>(p.other, stage, first_m_, step, thread, [&](int n, int, int) { return n < images; });
    stage += C::kLeftBytes * (p.other.y != nullptr ? 2 : 1);
    if (p.gathered.prologue != Prologue::none)
      transform<C::kN>(p.gathered, stage, first_n_, step, thread, [&](int n, int q, int r) {
        const int y = q * p.rows.stride + dy_, x = r * p.columns.stride + dx_;
        return n < images && y >= 0 && y < p.rows.size && x >= 0 && x < p.columns.size;
      });
  }

  GPU_INLINE void find_place(TilePlace<C::kM>& place, int thread) const {
    ChannelPlace<C>::find_place(place, thread, C::kConsumers);
  }

 private:
  using ChannelPlace<C>::first_m_, ChannelPlace<C>::first_n_, ChannelPlace<C>::dy_, ChannelPlace<C>::dx_;

  // Panels of 64 pixels and 64 channels each, of kChannels channels; those of the second tensor follow.
  template <int kChannels, class Inside>
  GPU_INLINE void transform(
      const Operand<T>& operand, unsigned char* panels, int first, const Step& step, int thread, Inside inside) const {
    using Panel = MatrixTile<T, C::kK, 64, true>;
    auto* x = reinterpret_cast<Panel*>(panels);
    const auto* y = reinterpret_cast<const Panel*>(panels + kChannels / 64 * C::kPanel);
#pragma unroll 1
    for (int i = thread; i < C::kK * kChannels / kVec<T>; i += C::kConsumers) {
      const int chunk = i % Panel::kChunks, pixel = i / Panel::kChunks % C::kK, panel = i / Panel::kChunks / C::kK;
      const int channel = first + panel * 64 + chunk * kVec<T>;
      const int line = pixel >> w_.column_bits, r = step.r + pixel - (line << w_.column_bits);
      const int image = line >> w_.row_bits, q = step.q + line - (image << w_.row_bits), n = step.n + image;
      if (channel < operand.channels && inside(n, q, r))
        apply_prologue(operand, x[panel].chunk(pixel, chunk),
                       operand.y != nullptr ? y[panel].chunk(pixel, chunk) : nullptr, w_.batch(n), channel);
    }
  }

  const TmaProblem<T>& w_;
  Step start_;
};

// --- on the host -----------------------------------------------------------------------------------------------------

// A tile of `pixels` pixels, a power of two: as many columns as there is use for, then as many rows, then images.
inline PixelTile pixel_tile(int pixels, int rows, int columns) {
  const auto side = [](int needed, int most) {
    int side = 1;
    while (side < needed && side < most) side *= 2;
    return side;
  };
  PixelTile tile;
  tile.columns = side(columns, pixels), tile.rows = side(rows, pixels / tile.columns);
  tile.images = pixels / tile.columns / tile.rows;
  return tile;
}

// A tensor [images, rows, columns, channels] in TMA tiles of 64 channels, every `stride`th pixel dense.
inline gpu::TensorView pixel_view(int64_t images, int64_t rows, int64_t columns, int64_t channels, int stride_y,
                                  int stride_x, const PixelTile& tile) {
  const int64_t row = columns * channels;
  gpu::TensorView view;
  view.add(stride_x * channels, 1, 64);
  view.add(columns / stride_x, stride_x * channels, tile.columns);
  view.add(stride_y, row, 1);
  view.add(rows / stride_y, stride_y * row, tile.rows);
  view.add(images, rows * row, tile.images);
  return view;
}

// A weight [outer, taps, inner] in TMA tiles of one tap.
inline gpu::TensorView weight_view(int64_t outer, int64_t taps, int64_t inner, int lines) {
  gpu::TensorView view;
  view.add(inner, 1, 64), view.add(taps, inner, 1), view.add(outer, taps * inner, lines);
  return view;
}

}  // namespace fastdcgan::cuda
