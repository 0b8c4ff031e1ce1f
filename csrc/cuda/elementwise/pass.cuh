// How elementwise passes and reductions go through a tensor [N, C, H, W], and with how many blocks.
//
// Every thread keeps to the same channels, whose coefficients or sums it has in registers, and goes through their
// values in steps of 16 bytes, several of them in flight. What it steps through are items:
//
//   channels_last   rows of pixels. `width` threads lie side by side along the columns of a row, the others above them.
//                   Where C is no multiple of a vector, `fold` pixels make one row, whose length is one; the channel of
//                   a column is then its remainder by C.
//   planes          (contiguous) vectors of pixels of one channel, plane after plane.
//
// A group's items are dealt out to gridDim.y blocks by turns, so the chip is as full at 64 channels as at 512. Where
// neither address nor size allows vectors, the same kernels take one value at a time.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/device/activation.h"
#include "cuda/device/vec.h"

namespace fastdcgan::cuda {

using gpu::kVec;
using gpu::Vec;

constexpr int kThreads = 256;
constexpr int kWidest = 32;         // threads along a row: more columns are other blocks'
constexpr int kMostGroups = 65535;  // of gridDim.z

// [groups * batch, channels, pixels], channels_last or contiguous.
struct Shape {
  int64_t groups, batch, channels, pixels;
  bool channels_last;

  int64_t group_size() const { return batch * channels * pixels; }
  int64_t size() const { return groups * group_size(); }
};

struct Pass {
  int64_t group_size;   // elements
  int64_t item_stride;  // channels_last: from row to row; planes: from plane to plane of a channel
  int64_t plane;        // planes: pixels
  int channels, columns;
  unsigned items;       // of a group and column; below 2^31, so that a few steps more don't overflow
  unsigned vectors;     // planes: of one plane
  int width, fold;
  int vector;           // elements of an access: kVec or 1
  bool planes;
  dim3 grid;

  int parts() const { return static_cast<int>(grid.y); }
  // Partial results of a channel and group.
  int slots() const { return parts() * fold; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t greatest_common_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

// How a pass goes through tensors of `shape` at the addresses `all`, with as many blocks as the multiprocessors hold at
// once. The shape has at least one element.
template <class T, class... Pointers>
Pass make_pass(const Shape& s, int blocks_per_multiprocessor, Pointers... all) {
  Pass w{};
  const bool aligned = (gpu::aligned(all) && ...);
  w.planes = !s.channels_last;
  w.group_size = s.group_size();
  w.channels = static_cast<int>(s.channels);
  w.fold = 1;
  int64_t column_blocks;
  if (w.planes) {
    w.vector = aligned && s.pixels % kVec<T> == 0 ? kVec<T> : 1;
    w.vectors = static_cast<unsigned>(s.pixels / w.vector);
    w.items = static_cast<unsigned>(s.batch * w.vectors);
    w.item_stride = s.channels * s.pixels;
    w.plane = s.pixels;
    w.columns = w.channels;
    w.width = 1;
    column_blocks = w.columns;
  } else {
    const int64_t rows = s.batch * s.pixels, fold = kVec<T> / greatest_common_divisor(s.channels, kVec<T>);
    const bool vectors = aligned && rows % fold == 0;
    w.vector = vectors ? kVec<T> : 1;
    w.fold = vectors ? static_cast<int>(fold) : 1;
    w.columns = w.channels * w.fold;
    w.items = static_cast<unsigned>(rows / w.fold);
    w.item_stride = w.columns;
    const int64_t side_by_side = ceil_div(w.columns, w.vector);
    for (w.width = 1; w.width < kWidest && w.width < side_by_side;) w.width *= 2;
    column_blocks = ceil_div(side_by_side, w.width);
  }
  // No more blocks than run at once: a few left over would take as long again.
  const int64_t at_once = int64_t{gpu::multiprocessors()} * blocks_per_multiprocessor;
  const int64_t most = ceil_div(w.items, kThreads / w.width);
  const int64_t parts = std::clamp<int64_t>(at_once / (column_blocks * s.groups), 1, most);
  w.grid = dim3(static_cast<unsigned>(column_blocks), static_cast<unsigned>(parts), static_cast<unsigned>(s.groups));
  return w;
}

// Where a thread is in a pass.
template <int V, bool kPlanes>
struct Place {
  const Pass& w;
  int column;  // the first of V
  unsigned item, step, items;

  GPU_INLINE explicit Place(const Pass& pass) : w(pass) {
    const int x = kPlanes ? 0 : threadIdx.x % w.width, y = kPlanes ? threadIdx.x : threadIdx.x / w.width;
    const int tall = kPlanes ? kThreads : kThreads / w.width;
    column = kPlanes ? blockIdx.x : (blockIdx.x * w.width + x) * V;
    item = blockIdx.y * tall + y;
    step = gridDim.y * tall;
    items = column < w.columns ? w.items : 0;  // none for threads beyond the last column
  }

  // The element at which item `i` begins.
  GPU_INLINE int64_t at(unsigned i) const {
    const int64_t group = blockIdx.z * w.group_size;
    if constexpr (kPlanes) {
      const unsigned plane = i / w.vectors;
      return group + plane * w.item_stride + column * w.plane + (i - plane * w.vectors) * V;
    } else {
      return group + i * w.item_stride + column;
    }
  }

  GPU_INLINE int channel(int i) const { return kPlanes ? column : (column + i) % w.channels; }

  // Calls body(n, at) for all items of the thread, `kTogether` at a time as long as there are so many, then one by one:
  // at(u) is where number u of the n begins, and n a constant.
  template <int kTogether, class Body>
  GPU_INLINE void for_each(Body body) const {
    unsigned first = item;
    const auto begin = [&](int u) { return at(first + u * step); };
    for (; first + (kTogether - 1) * step < items; first += kTogether * step)
      body(std::integral_constant<int, kTogether>{}, begin);
    if constexpr (kTogether > 1)
      for (; first < items; first += step) body(std::integral_constant<int, 1>{}, begin);
  }
};

// How many channels a thread keeps to.
template <int V, bool kPlanes>
constexpr int kOwn = kPlanes ? 1 : V;

// A row of per-channel values [rows, groups, channels] for the channels of a thread.
template <int V, bool kPlanes>
struct PerChannel {
  float value[kOwn<V, kPlanes>];

  GPU_INLINE PerChannel(const float* vectors, int row, const Place<V, kPlanes>& place) {
    const int64_t begin = (static_cast<int64_t>(row) * gridDim.z + blockIdx.z) * place.w.channels;
    const float* from = gpu::from_here_on(vectors + begin);
    if constexpr (!kPlanes && V % 4 == 0) {
      if (place.w.fold == 1 && gpu::aligned(from)) {  // the same for all threads
#pragma unroll
        for (int i = 0; i < V; i += 4) {
          const auto four = place.items > 0 ? gpu::load<4>(from + place.column + i) : Vec<float, 4>{};
#pragma unroll
          for (int j = 0; j < 4; ++j) value[i + j] = four[j];
        }
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn<V, kPlanes>; ++i) value[i] = place.items > 0 ? from[place.channel(i)] : 0.f;
  }
  // For value `i` of a vector.
  GPU_INLINE float operator[](int i) const { return value[kPlanes ? 0 : i]; }
};

// Calls `f` with the pass's vector size and layout as constants: f(integral_constant V, bool_constant planes).
template <class T, class F>
void with_layout(const Pass& pass, F&& f) {
  using One = std::integral_constant<int, 1>;
  using Many = std::integral_constant<int, kVec<T>>;
  if (pass.planes)
    pass.vector == 1 ? f(One{}, std::true_type{}) : f(Many{}, std::true_type{});
  else
    pass.vector == 1 ? f(One{}, std::false_type{}) : f(Many{}, std::false_type{});
}

// --- activations -----------------------------------------------------------------------------------------------------

struct Activation {
  int id;
  float slope;

  // Chosen while the kernel runs: for the less usual ones, and where values come one at a time.
  RuntimeActivation any() const { return {id, slope}; }
};

// Calls `f` with the functor of `act`: one of its own for those that GANs are made of. `act` is a known one.
template <class F>
void with_functor(Activation act, F&& f) {
  switch (static_cast<ActId>(act.id)) {
    case ActId::identity: return f(Identity<float>(act.slope));
    case ActId::relu: return f(ReLU<float>(act.slope));
    case ActId::leaky_relu: return f(LeakyReLU<float>(act.slope));
    case ActId::tanh: return f(Tanh<float>(act.slope));
    default: return f(act.any());
  }
}

// LeakyReLU with a slope for each channel (PReLU): a row of the coefficients.
struct LearnedSlope {
  int row;
};

template <class Act>
constexpr bool kLearnsSlope = std::is_same_v<Act, LearnedSlope>;

// The activation for the channels of a thread: of N values of a vector from `first` on.
template <class Act, int V, bool kPlanes>
struct PerValue {
  const Act& act;

  GPU_INLINE PerValue(const Act& of_all, const float*, const Place<V, kPlanes>&) : act(of_all) {}
  template <int N>
  GPU_INLINE void activate(int, float (&z)[N]) const {
    cuda::activate(act, z);
  }
  template <int N>
  GPU_INLINE void differentiate(int, float (&z)[N]) const {
    cuda::differentiate(act, z);
  }
};

template <int V, bool kPlanes>
struct PerValue<LearnedSlope, V, kPlanes> {
  PerChannel<V, kPlanes> slope;

  GPU_INLINE PerValue(LearnedSlope act, const float* coef, const Place<V, kPlanes>& place)
      : slope(coef, act.row, place) {}
  GPU_INLINE void activate(int first, float (&z)[1]) const { cuda::activate(LeakyReLU<float>(slope[first]), z); }
  GPU_INLINE void differentiate(int first, float (&z)[1]) const {
    cuda::differentiate(LeakyReLU<float>(slope[first]), z);
  }
};

// Calls `f` with the functor of `act` for vectors of V: where values come one at a time, with the one for all
// activations. An `act` that is a functor already is it.
template <class V, class Act, class F>
void with_functor_for(V, const Act& act, F&& f) {
  if constexpr (!std::is_same_v<Act, Activation>)
    f(act);
  else if constexpr (V::value == 1)
    f(act.any());
  else
    with_functor(act, f);
}

inline bool known_activation(int64_t id) {
  return with_activation<float>(static_cast<int>(id), 0.f, [](const auto&) {});
}

}  // namespace fastdcgan::cuda
