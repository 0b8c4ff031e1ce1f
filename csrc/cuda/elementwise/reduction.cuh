// Per-channel reductions in two stages without atomics: every block writes what its share came to, a second kernel
// joins the shares in a fixed order. The same input so gives the same bits.
#pragma once

#include "cuda/elementwise/pass.cuh"

namespace fastdcgan::cuda {

constexpr int kWarps = kThreads / 32;

// A block's threads' results, of `Part` each.
template <class Part, int V, bool kPlanes>
struct BlockShared {
  Part part[kPlanes ? kWarps : kThreads * V];
};

// Where result `i` of a block's kThreads * V lies: the 16 bytes that threads side by side write at a time are in
// different banks, and so is what they read at a time, one column after the other.
template <class Part, int V>
GPU_INLINE unsigned in_banks(unsigned i) {
  constexpr int kSize = sizeof(Part), kTogether = kSize < 16 ? 16 / kSize : 1, kOfThread = V * kSize / 16;
  if constexpr (16 % kSize == 0 && kOfThread > 1 && (kOfThread & (kOfThread - 1)) == 0)
    return i ^ (i / (8 * kTogether) % kOfThread * kTogether);
  else
    return i;
}

// Joins what the threads of a block have for the same column; calls emit(column, part) once for each column. `Part` has
// merge(other), and down(distance): that of the lane so far above (all but lane 0's end up meaningless).
template <class Part, int V, bool kPlanes, class Emit>
GPU_INLINE void join_block(Part (&mine)[V], const Place<V, kPlanes>& place, Emit emit) {
  auto& shared = gpu::shared_memory<BlockShared<Part, V, kPlanes>>();
  if constexpr (kPlanes) {
#pragma unroll
    for (int i = 1; i < V; ++i) mine[0].merge(mine[i]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) mine[0].merge(mine[0].down(distance));
    if (threadIdx.x % 32 == 0) shared.part[threadIdx.x / 32] = mine[0];
    __syncthreads();
    if (threadIdx.x == 0) {
      Part all = shared.part[0];
      for (int warp = 1; warp < kWarps; ++warp) all.merge(shared.part[warp]);
      emit(place.column, all);
    }
  } else {
    const int width = place.w.width, across = width * V, tall = kThreads / width;
    constexpr int kTogether = V * sizeof(Part) > 16 && 16 % sizeof(Part) == 0 ? 16 / sizeof(Part) : 1;
#pragma unroll
    for (int first = 0; first < V; first += kTogether) {
      Part* to = &shared.part[in_banks<Part, V>(threadIdx.x * V + first)];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) to[i] = mine[first + i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < across; i += kThreads) {
      const int column = blockIdx.x * across + i;
      if (column >= place.w.columns) continue;
      Part all = shared.part[in_banks<Part, V>(i)];
      for (int row = 1; row < tall; ++row) all.merge(shared.part[in_banks<Part, V>(row * across + i)]);
      emit(column, all);
    }
  }
}

// The partial results of a block lie in partials[group][part][value][column]: with folded rows that is
// [group][part][value][fold][channel].
GPU_INLINE float* partial(float* partials, int values, int value, const Pass& w, int column) {
  const int64_t block = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  return partials + (block * values + value) * w.columns + column;
}

// --- the second stage ------------------------------------------------------------------------------------------------

struct Combine {
  static constexpr int kChannels = 8;  // side by side: the 32 bytes that memory gives at a time
  static constexpr int kStrands = 32;  // threads that share a channel's parts
  static constexpr int kInFlight = 4;
};

// Where the partials of a channel are. All counts are of one group.
struct Slots {
  int slots, fold, channels, groups;

  // Number `slot` of value `value`, of which a block wrote `values`.
  GPU_INLINE int64_t at(int group, int slot, int values, int value, int channel) const {
    const int64_t part = static_cast<int64_t>(group) * (slots / fold) + slot / fold;
    return ((part * values + value) * fold + slot % fold) * channels + channel;
  }
};

template <class Part>
struct CombineShared {
  Part strand[Combine::kStrands][Combine::kChannels];
};

// grid (channels / kChannels rounded up, groups), block (kChannels, kStrands): out = what all parts of a channel come
// to. `Part` has load(partials, slots, group, slot, channel) and store(out, slots, group, channel).
template <class Part>
__global__ void __launch_bounds__(Combine::kChannels* Combine::kStrands)
    combine(const float* __restrict__ partials, Slots slots, float* __restrict__ out) {
  auto& shared = gpu::shared_memory<CombineShared<Part>>();
  const int channel = blockIdx.x * Combine::kChannels + threadIdx.x, group = blockIdx.y;
  Part all;
  gpu::await_kernels_before();
  if (channel < slots.channels) {
    for (int first = threadIdx.y; first < slots.slots; first += Combine::kInFlight * Combine::kStrands) {
      Part parts[Combine::kInFlight];
#pragma unroll
      for (int u = 0; u < Combine::kInFlight; ++u) {
        const int slot = first + u * Combine::kStrands;
        if (slot < slots.slots) parts[u] = Part::load(partials, slots, group, slot, channel);
      }
#pragma unroll
      for (int u = 0; u < Combine::kInFlight; ++u)
        if (first + u * Combine::kStrands < slots.slots) all.merge(parts[u]);
    }
  }
  shared.strand[threadIdx.y][threadIdx.x] = all;
  __syncthreads();
  if (threadIdx.y == 0 && channel < slots.channels) {
    for (int strand = 1; strand < Combine::kStrands; ++strand) all.merge(shared.strand[strand][threadIdx.x]);
    all.store(out, slots, group, channel);
  }
}

template <class Part>
void launch_combine(const char* name, const float* partials, const Slots& slots, float* out, gpu::Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(slots.channels, Combine::kChannels)), slots.groups);
  const dim3 block(Combine::kChannels, Combine::kStrands);
  gpu::launch_early(combine<Part>, {name, grid, block, sizeof(CombineShared<Part>), stream}, partials, slots, out);
}

inline Slots slots_of(const Pass& w) { return {w.slots(), w.fold, w.channels, static_cast<int>(w.grid.z)}; }

// Floats that the first stage writes, of `values` for each of its columns.
inline int64_t partials_size(const Pass& w, int values) {
  return int64_t{w.grid.z} * w.grid.y * values * w.columns;
}

}  // namespace fastdcgan::cuda
