// Where the numbers of a contraction's two factors lie in memory, step by step of its depth. A loader gives a block the
// tiles of one step after the other, and says which of a thread's chunks hold pixels of a tensor (the others are
// padding, and stay 0 whatever the prologue is).
#pragma once

#include "cuda/gemm/epilogue.cuh"
#include "cuda/gemm/matrix_tile.cuh"

namespace fastdcgan::cuda {

// Division of numbers below 2^31 by one that is known beforehand (Granlund and Montgomery, "Division by Invariant
// Integers using Multiplication", 1994).
struct Divider {
  unsigned divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(unsigned d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<unsigned>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }
  GPU_HOST_INLINE int operator()(int n) const {
    const unsigned high = static_cast<unsigned>(static_cast<uint64_t>(static_cast<unsigned>(n)) * multiplier >> 32);
    return static_cast<int>((high + static_cast<unsigned>(n)) >> shift);
  }
};

enum class Op : int { conv = 0, conv_transpose = 1, weight_grad = 2 };

// One axis of the image. The gathered operand is the one that the taps shift: the input of conv and conv_transpose,
// and of weight_grad the larger of the two.
struct Axis {
  int size = 0;    // of the gathered operand
  int pixels = 0;  // conv, conv_transpose: of the output; weight_grad: of the linear operand
  int kernel = 1, stride = 1, padding = 0, dilation = 1;
};

template <class T>
struct Problem {
  Axis rows, columns;
  Operand<T> gathered;  // [groups*batch, rows.size, columns.size, C]
  Operand<T> other;     // the weight [Co, taps, C] of conv or [C, taps, Co] of conv_transpose, or the linear operand
  Epilogue<T> epilogue;     // [groups*batch, rows.pixels, columns.pixels, Co]; weight_grad: [Cl, taps, C]
  Divider per_image, per_row;  // weight_grad: pixels of an image, and of a row of it
  int groups = 1, batch = 0;   // statistics groups, and images of each
  int tiles_m = 0, tiles_n = 0;  // weight_grad: of the channels; else tiles of a group's pixels, and of the channels
  int splits = 1;
  int64_t values = 0;  // of one part

  GPU_HOST_INLINE int phases() const { return rows.stride * columns.stride; }  // of conv_transpose
};

// Where a block's results go, which waits in shared memory until they are there.
template <int kM>
struct TilePlace {
  int64_t slot;  // of the partials
  int first_channel, group;
  int pixel[kM];  // of each row of the tile, negative where it has none
};

// --- conv and conv_transpose -----------------------------------------------------------------------------------------

// The taps of one output phase along an axis: output pixel q*apart + phase is the sum over j < count of tap
// first + j*tap_step times the input pixel q*stride + origin + j*step (fastdcgan/geometry.py, `phases`).
struct Taps {
  int count, first, tap_step, stride, origin, step, apart, phase, pixels;
};

GPU_INLINE int common_divisor(int a, int b) {
  while (b != 0) {
    const int rest = a % b;
    a = b, b = rest;
  }
  return a;
}

template <Op op>
GPU_INLINE Taps taps_of(const Axis& axis, int phase) {
  if constexpr (op == Op::conv) {
    return {axis.kernel, 0, 1, axis.stride, -axis.padding, axis.dilation, 1, 0, axis.pixels};
  } else {
    const int common = common_divisor(axis.dilation, axis.stride), step = axis.stride / common;
    Taps taps{0, 0, step, 1, 0, -(axis.dilation / common), axis.stride, phase, 0};
    for (int k = min(step, axis.kernel) - 1; k >= 0; --k) {
      const int shifted = phase + axis.padding - k * axis.dilation;
      if (shifted % axis.stride == 0)
        taps.first = k, taps.origin = shifted / axis.stride, taps.count = (axis.kernel - k + step - 1) / step;
    }
    taps.pixels = (axis.pixels - phase + axis.stride - 1) / axis.stride;
    return taps;
  }
}

// A block's place among all: its tile of a group's pixels, or of a phase of them.
struct BlockPlace {
  int first_channel, phase, tile, group;
};

template <class C, class T>
GPU_INLINE BlockPlace block_place(const Problem<T>& p) {
  const int phases = C::kOp == Op::conv ? 1 : p.phases(), columns = p.tiles_n * phases;
  const int column = blockIdx.x % columns, m = blockIdx.x / columns;
  return {column % p.tiles_n * C::kN, column / p.tiles_n, m % p.tiles_m, m / p.tiles_m};
}

// How many phases there are along the columns.
template <class C, class T>
GPU_INLINE int phases_x(const Problem<T>& p) {
  return C::kOp == Op::conv ? 1 : p.columns.stride;
}

// The steps of a part (blockIdx.y) among `all` of a block.
struct Share {
  int first, steps;
  GPU_INLINE Share(int all, int parts) {
    const int most = (all + parts - 1) / parts;
    first = min(static_cast<int>(blockIdx.y) * most, all);
    steps = min(most, all - first);
  }
};

// What a block computes, and its steps: C::kK channels of a tap after another.
template <class C>
class PixelSteps {
 public:
  using T = typename C::T;
  struct Step {
    int y, x, channel;  // taps of the axes, first channel
  };

  GPU_INLINE explicit PixelSteps(const Problem<T>& p)
      : p_(p), block_(block_place<C>(p)), rows_(taps_of<C::kOp>(p.rows, block_.phase / phases_x<C>(p))),
        columns_(taps_of<C::kOp>(p.columns, block_.phase % phases_x<C>(p))) {
    const int blocks = (p.gathered.channels + C::kK - 1) / C::kK;
    const Share share(rows_.count * columns_.count * blocks, p.splits);
    steps = share.steps;
    const int tap = share.first / blocks;
    start_ = {0, 0, share.first % blocks * C::kK};
    if (columns_.count > 0) start_.y = tap / columns_.count, start_.x = tap % columns_.count;
  }

  int steps;

  GPU_INLINE Step first() const { return start_; }
  GPU_INLINE void advance(Step& step) const {
    step.channel += C::kK;
    if (step.channel < p_.gathered.channels) return;
    step.channel = 0;
    if (++step.x == columns_.count) step.x = 0, ++step.y;
  }

 protected:
  // The tap of the weight.
  GPU_INLINE int tap(const Step& step) const {
    return (rows_.first + step.y * rows_.tap_step) * p_.columns.kernel + columns_.first + step.x * columns_.tap_step;
  }
  // Pixel (q, r) of the block's phase of image n, as an output pixel.
  GPU_INLINE int output_pixel(int n, int q, int r) const {
    const int y = n * p_.rows.pixels + q * rows_.apart + rows_.phase;
    return y * p_.columns.pixels + r * columns_.apart + columns_.phase;
  }
  // All of the place but its pixels; by one thread.
  GPU_INLINE void set_place(TilePlace<C::kM>& place) const {
    const int phases = C::kOp == Op::conv ? 1 : p_.phases();
    place.first_channel = block_.first_channel, place.group = block_.group;
    place.slot = (static_cast<int64_t>(block_.group) * phases + block_.phase) * p_.tiles_m + block_.tile;
  }

  const Problem<T>& p_;
  const BlockPlace block_;
  const Taps rows_, columns_;

 private:
  Step start_;
};

// The tile's loads. `C` is a Contraction.
template <class C>
class PixelLoader : public PixelSteps<C> {
 public:
  using T = typename C::T;
  using typename PixelSteps<C>::Step;

  GPU_INLINE PixelLoader(const Problem<T>& p, TilePlace<C::kM>& place) : PixelSteps<C>(p), thread_(threadIdx.x) {
    const int per_row = columns_.pixels, per_image = rows_.pixels * per_row, count = p.batch * per_image;
    const auto locate = [&](int row, int& n, int& q, int& r) {
      const int index = block_.tile * C::kM + row;
      if (index >= count) return false;
      n = index / per_image, q = index % per_image / per_row, r = index % per_row;
      n += block_.group * p.batch;
      return true;
    };
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      int n = 0, q = 0, r = 0;
      const bool inside = locate(left_row(i), n, q, r);
      y_[i] = inside ? q * rows_.stride + rows_.origin : kOutside;
      x_[i] = r * columns_.stride + columns_.origin;
      image_[i] = n * p.rows.size;
    }
    for (int row = thread_; row < C::kM; row += C::kThreads) {
      int n = 0, q = 0, r = 0;
      const bool inside = locate(row, n, q, r);
      place.pixel[row] = inside ? this->output_pixel(n, q, r) : -1;
    }
    if (thread_ == 0) this->set_place(place);
  }

  // Begins the copies of a step; returns a bit for each chunk of the left tile that holds pixels.
  template <class Stage>
  GPU_INLINE unsigned load(Stage& stage, int slot, const Step& step) const {
    unsigned valid = 0;
    const Operand<T>& a = p_.gathered;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const int y = y_[i] + step.y * rows_.step, x = x_[i] + step.x * columns_.step;
      const int channel = step.channel + left_column();
      const bool inside = y >= 0 && y < p_.rows.size && x >= 0 && x < p_.columns.size;
      const int count = inside ? a.channels - channel : 0;
      int64_t at = 0;
      if (count > 0) at = static_cast<int64_t>((image_[i] + y) * p_.columns.size + x) * a.channels + channel;
      load_chunk(stage.left[slot].chunk(left_row(i), left_chunk()), a.x + at, count, a.vectors);
      if (a.y != nullptr) load_chunk(stage.left_y()[slot].chunk(left_row(i), left_chunk()), a.y + at, count, a.vectors);
      valid |= static_cast<unsigned>(count > 0) << i;
    }
    // [Co, taps, C] with a row for each output channel, [C, taps, Co] with a row for each input channel.
    const Operand<T>& w = p_.other;
    constexpr bool kInputs = C::Right::kDepthRows;
    const int tap = this->tap(step);
    const int lines = kInputs ? a.channels : p_.epilogue.channels, length = kInputs ? p_.epilogue.channels : a.channels;
    const int first = kInputs ? step.channel : block_.first_channel;
    const int at = (kInputs ? block_.first_channel : step.channel) + right_column();
#pragma unroll
    for (int i = 0; i < kRight; ++i) {
      const int row = right_row(i), line = first + row, count = line < lines ? length - at : 0;
      const T* from = w.x;
      if (count > 0) from += static_cast<int64_t>(line * (p_.rows.kernel * p_.columns.kernel) + tap) * length + at;
      load_chunk(stage.right[slot].chunk(row, right_chunk()), from, count, w.vectors);
    }
    return valid;
  }

  GPU_INLINE bool has_prologue() const { return p_.gathered.prologue != Prologue::none; }

  template <class Stage>
  GPU_INLINE void prologue(Stage& stage, int slot, const Step& step, unsigned valid) const {
#pragma unroll 1
    for (int i = 0; i < kLeft; ++i) {
      if (!(valid >> i & 1)) continue;
      T* x = stage.left[slot].chunk(left_row(i), left_chunk());
      const T* y = p_.gathered.y == nullptr ? nullptr : stage.left_y()[slot].chunk(left_row(i), left_chunk());
      apply_prologue(p_.gathered, x, y, block_.group, step.channel + left_column());
    }
  }

  static constexpr int kBits = C::kM * C::Left::kChunks / C::kThreads;

 private:
  static constexpr int kLeft = kBits, kRight = C::Right::kRows * C::Right::kChunks / C::kThreads;
  static constexpr int kOutside = -(1 << 30);
  GPU_INLINE int left_chunk() const { return thread_ % C::Left::kChunks; }
  GPU_INLINE int left_column() const { return left_chunk() * kVec<T>; }
  GPU_INLINE int left_row(int i) const { return thread_ / C::Left::kChunks + i * (C::kThreads / C::Left::kChunks); }
  GPU_INLINE int right_chunk() const { return thread_ % C::Right::kChunks; }
  GPU_INLINE int right_column() const { return right_chunk() * kVec<T>; }
  GPU_INLINE int right_row(int i) const { return thread_ / C::Right::kChunks + i * (C::kThreads / C::Right::kChunks); }

  using PixelSteps<C>::p_, PixelSteps<C>::block_, PixelSteps<C>::rows_, PixelSteps<C>::columns_;
  const int thread_;
  int y_[kLeft], x_[kLeft], image_[kLeft];
};

// --- weight_grad -----------------------------------------------------------------------------------------------------

// What a block computes: for channels of the linear operand, the left factor, and channels of the gathered one, the
// right factor, shifted by a tap. The depth are the pixels of the linear operand's grid.
template <class C>
class ChannelPlace {
 public:
  using T = typename C::T;

  // Where the results go; by `threads` threads.
  GPU_INLINE void find_place(TilePlace<C::kM>& place, int thread, int threads) const {
    const int taps = p_.rows.kernel * p_.columns.kernel;
    for (int row = thread; row < C::kM; row += threads)
      place.pixel[row] = first_m_ + row < p_.other.channels ? (first_m_ + row) * taps + tap_ : -1;
    if (thread == 0) place.first_channel = first_n_, place.group = 0, place.slot = 0;
  }

 protected:
  GPU_INLINE explicit ChannelPlace(const Problem<T>& p) : p_(p) {
    const int of_row = p.tiles_n * p.rows.kernel * p.columns.kernel, column = blockIdx.x % of_row;
    tap_ = column / p.tiles_n;
    first_m_ = static_cast<int>(blockIdx.x) / of_row * C::kM, first_n_ = column % p.tiles_n * C::kN;
    dy_ = tap_ / p.columns.kernel * p.rows.dilation - p.rows.padding;
    dx_ = tap_ % p.columns.kernel * p.columns.dilation - p.columns.padding;
  }

  const Problem<T>& p_;
  int tap_, first_m_, first_n_, dy_, dx_;  // the last two: what the tap shifts by
};

template <class C>
class ChannelLoader : public ChannelPlace<C> {
 public:
  using T = typename C::T;
  struct Step {
    int group, first;  // pixel of the group
  };

  GPU_INLINE ChannelLoader(const Problem<T>& p, TilePlace<C::kM>& place)
      : ChannelPlace<C>(p), thread_(threadIdx.x), pixels_(p.batch * p.rows.pixels * p.columns.pixels) {
    this->find_place(place, thread_, C::kThreads);
    const int per_group = (pixels_ + C::kK - 1) / C::kK;
    const Share share(p.groups * per_group, p.splits);
    steps = share.steps;
    start_ = {share.first / per_group, share.first % per_group * C::kK};
  }

  int steps;

  GPU_INLINE Step first() const { return start_; }
  GPU_INLINE void advance(Step& step) const {
    step.first += C::kK;
    if (step.first >= pixels_) step.first = 0, ++step.group;
  }

  // Begins the copies of a step; returns a bit for each chunk that holds pixels: of the left tile, then of the right.
  template <class Stage>
  GPU_INLINE unsigned load(Stage& stage, int slot, const Step& step) const {
    unsigned valid = 0;
    const Operand<T>&linear = p_.other, &gathered = p_.gathered;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) {
      const int row = row_of<typename C::Left>(i), chunk = chunk_of<typename C::Left>();
      const int index = step.first + row, channel = first_m_ + chunk * kVec<T>;
      const int count = index < pixels_ ? linear.channels - channel : 0;
      int64_t at = 0;
      if (count > 0) at = (static_cast<int64_t>(step.group) * pixels_ + index) * linear.channels + channel;
      load_chunk(stage.left[slot].chunk(row, chunk), linear.x + at, count, linear.vectors);
      if (linear.y != nullptr) load_chunk(stage.left_y()[slot].chunk(row, chunk), linear.y + at, count, linear.vectors);
      valid |= static_cast<unsigned>(count > 0) << i;
    }
#pragma unroll
    for (int i = 0; i < kRight; ++i) {
      const int row = row_of<typename C::Right>(i), chunk = chunk_of<typename C::Right>();
      const int index = step.first + row, channel = first_n_ + chunk * kVec<T>;
      const int n = p_.per_image(index), within = index - n * static_cast<int>(p_.per_image.divisor);
      const int q = p_.per_row(within), r = within - q * static_cast<int>(p_.per_row.divisor);
      const int y = q * p_.rows.stride + dy_, x = r * p_.columns.stride + dx_;
      const bool inside = index < pixels_ && y >= 0 && y < p_.rows.size && x >= 0 && x < p_.columns.size;
      const int count = inside ? gathered.channels - channel : 0;
      int64_t at = 0;
      if (count > 0) {
        const int line = (step.group * p_.batch + n) * p_.rows.size + y;
        at = static_cast<int64_t>(line * p_.columns.size + x) * gathered.channels + channel;
      }
      load_chunk(stage.right[slot].chunk(row, chunk), gathered.x + at, count, gathered.vectors);
      if (gathered.y != nullptr) {
        auto* y_tile = stage.right_y(linear.y != nullptr) + slot;
        load_chunk(y_tile->chunk(row, chunk), gathered.y + at, count, gathered.vectors);
      }
      valid |= static_cast<unsigned>(count > 0) << (kLeft + i);
    }
    return valid;
  }

  GPU_INLINE bool has_prologue() const {
    return p_.other.prologue != Prologue::none || p_.gathered.prologue != Prologue::none;
  }

  template <class Stage>
  GPU_INLINE void prologue(Stage& stage, int slot, const Step& step, unsigned valid) const {
    if (p_.other.prologue != Prologue::none) {
#pragma unroll 1
      for (int i = 0; i < kLeft; ++i) {
        if (!(valid >> i & 1)) continue;
        const int row = row_of<typename C::Left>(i), chunk = chunk_of<typename C::Left>();
        const T* y = p_.other.y == nullptr ? nullptr : stage.left_y()[slot].chunk(row, chunk);
        apply_prologue(p_.other, stage.left[slot].chunk(row, chunk), y, step.group, first_m_ + chunk * kVec<T>);
      }
    }
    if (p_.gathered.prologue != Prologue::none) {
#pragma unroll 1
      for (int i = 0; i < kRight; ++i) {
        if (!(valid >> (kLeft + i) & 1)) continue;
        const int row = row_of<typename C::Right>(i), chunk = chunk_of<typename C::Right>();
        const T* y = p_.gathered.y == nullptr ? nullptr : stage.right_y(p_.other.y != nullptr)[slot].chunk(row, chunk);
        apply_prologue(p_.gathered, stage.right[slot].chunk(row, chunk), y, step.group, first_n_ + chunk * kVec<T>);
      }
    }
  }

 private:
  static constexpr int kLeft = C::Left::kRows * C::Left::kChunks / C::kThreads;
  static constexpr int kRight = C::Right::kRows * C::Right::kChunks / C::kThreads;

  template <class Tile>
  GPU_INLINE int chunk_of() const {
    return thread_ % Tile::kChunks;
  }
  template <class Tile>
  GPU_INLINE int row_of(int i) const {
    return thread_ / Tile::kChunks + i * (C::kThreads / Tile::kChunks);
  }

  using ChannelPlace<C>::p_, ChannelPlace<C>::first_m_, ChannelPlace<C>::first_n_;
  using ChannelPlace<C>::dy_, ChannelPlace<C>::dx_;
  const int thread_, pixels_;
  Step start_;

 public:
  static constexpr int kBits = kLeft + kRight;
};

}  // namespace fastdcgan::cuda
