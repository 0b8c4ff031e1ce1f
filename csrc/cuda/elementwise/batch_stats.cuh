// Mean and variance of every channel: Welford's recurrence in each thread, joined by Chan's formula. No stage subtracts
// large, nearly equal numbers.
#pragma once

#include "common/moments.h"
#include "cuda/elementwise/reduction.cuh"

namespace fastdcgan::cuda {

constexpr int kStatsBlocks = 4;

struct StatsPart : Moments<float> {
  static constexpr int kValues = 3;

  GPU_INLINE StatsPart down(int distance) const {
    StatsPart other;
    other.count = __shfl_down_sync(~0u, count, distance);
    other.mean = __shfl_down_sync(~0u, mean, distance);
    other.m2 = __shfl_down_sync(~0u, m2, distance);
    return other;
  }
  static GPU_INLINE StatsPart load(const float* partials, const Slots& s, int group, int slot, int channel) {
    StatsPart part;
    part.count = partials[s.at(group, slot, kValues, 0, channel)];
    part.mean = partials[s.at(group, slot, kValues, 1, channel)];
    part.m2 = partials[s.at(group, slot, kValues, 2, channel)];
    return part;
  }
  // stats [3, groups, C]: mean, biased and unbiased variance
  GPU_INLINE void store(float* stats, const Slots& s, int group, int channel) const {
    const int64_t row = static_cast<int64_t>(s.groups) * s.channels;
    float* to = stats + static_cast<int64_t>(group) * s.channels + channel;
    to[0] = mean;
    to[row] = m2 / count;
    to[2 * row] = m2 / (count - 1);
  }
};

template <class T, int V, bool kPlanes>
__global__ void __launch_bounds__(kThreads, kStatsBlocks)
    batch_stats(const T* __restrict__ y, Pass pass, float* __restrict__ partials) {
  const Place<V, kPlanes> place(pass);
  gpu::await_kernels_before();
  float count = 0, mean[V] = {}, m2[V] = {};
  place.template for_each<4>([&](auto n, const auto& at) {
    constexpr int kCount = decltype(n)::value;
    Vec<T, V> values[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) values[u] = gpu::load<V>(y + at(u));
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      count += 1;
      const float share = 1 / count;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float value = gpu::to_float(values[u][i]), delta = value - mean[i];
        mean[i] += delta * share;
        m2[i] += delta * (value - mean[i]);
      }
    }
  });
  StatsPart parts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) parts[i].count = count, parts[i].mean = mean[i], parts[i].m2 = m2[i];
  join_block(parts, place, [&](int column, const StatsPart& all) {
    *partial(partials, StatsPart::kValues, 0, pass, column) = all.count;
    *partial(partials, StatsPart::kValues, 1, pass, column) = all.mean;
    *partial(partials, StatsPart::kValues, 2, pass, column) = all.m2;
  });
}

template <class T, int V, bool kPlanes>
void launch_batch_stats(const T* y, const Pass& pass, float* partials, gpu::Stream stream) {
  constexpr size_t kShared = sizeof(BlockShared<StatsPart, V, kPlanes>);
  gpu::launch_early(batch_stats<T, V, kPlanes>, {"batch_stats", pass.grid, kThreads, kShared, stream}, y, pass,
                    partials);
}

// stats [3, groups, C] of `y`; `allocate(n)` gives n floats that live until the stream has done this.
template <class T, class Allocate>
void batch_stats_pass(const Shape& shape, const T* y, Allocate allocate, float* stats, gpu::Stream stream) {
  const Pass pass = make_pass<T>(shape, kStatsBlocks, y);
  float* partials = allocate(partials_size(pass, StatsPart::kValues));
  with_layout<T>(pass, [&](auto v, auto planes) {
    launch_batch_stats<T, decltype(v)::value, decltype(planes)::value>(y, pass, partials, stream);
  });
  launch_combine<StatsPart>("combine_stats", partials, slots_of(pass), stats, stream);
}

}  // namespace fastdcgan::cuda
