// What happens to the sums of a tile before they are stored: the epilogue, and its partial statistics. See `Epilogue`
// in fastdcgan/backends/base.py.
//
// Partials are float [groups, slots, rows, channels]: (count, mean, M2) for `stats`, (sum(g), sum(g*xhat)) or (sum(g))
// for `grad_stats`. Every tile writes its own slot; they are merged afterwards in a fixed order. They are of the numbers
// as T stores them: the rounding error of a constant channel, the same everywhere, would otherwise stay as a distance to
// its mean, and be multiplied by 1/sqrt(eps).
#pragma once

#include "common/moments.h"
#include "cuda/gemm/prologue.cuh"

namespace fastdcgan::cuda {

enum class EpilogueKind : int { none = 0, bias = 1, activate = 2, stats = 3, grad_stats = 4 };

// An output of rows ("pixels") of `channels` numbers.
template <class T>
struct Epilogue {
  T* out = nullptr;
  float* parts = nullptr;  // where it is set, sums go there as they are, for reduce_splits
  const T* y = nullptr;    // grad_stats
  const float* coef = nullptr;
  float* partials = nullptr;
  EpilogueKind kind = EpilogueKind::none;
  RuntimeActivation act;
  int coef_rows = 0, coef_groups = 1;  // the groups of all coefficients: 1, or those of the batch
  int channels = 0;
  bool vectors = false;  // all rows begin at multiples of 16 bytes

  // Rows of the partials.
  GPU_HOST_INLINE int rows() const {
    return kind == EpilogueKind::stats ? 3 : kind == EpilogueKind::grad_stats ? coef_rows / 2 : 0;
  }
};

// What threads that share channels bring together.
template <class T, int kN, int kThreads>
struct Strands {
  static constexpr int kChunks = kN / kVec<T>, kStrands = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kThreads >= kN, "a thread keeps to its channels");
  float count[kStrands];
  float row[2][kStrands][kN];
};

template <int N>
GPU_INLINE void store_floats(float* to, const float (&values)[N], bool vectors, int count) {
  if (vectors) {
#pragma unroll
    for (int i = 0; i < N; i += 4)
      gpu::store(to + i, Vec<float, 4>{{values[i], values[i + 1], values[i + 2], values[i + 3]}});
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = values[i];
  }
}

// A chunk of a row of numbers.
template <class T, int N>
GPU_INLINE void store_chunk(T* to, const float (&values)[N], bool vectors, int count) {
  if (vectors) {
    gpu::store_numbers(to, values);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = gpu::from_float<T>(values[i]);
  }
}

template <class T, int N>
GPU_INLINE void read_chunk(float (&to)[N], const T* from, bool vectors, int count) {
  if (vectors) {
    gpu::load_numbers(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = i < count ? gpu::to_float(from[i]) : 0.f;
  }
}

// Where in its row a column's sum waits for the epilogue. Of 32 columns after 32 the fours are exchanged, so that eight
// threads that read the first four of eight columns each find them in different banks.
GPU_INLINE int staged(int column) { return column ^ (column >> 3 & 4); }

// The threads that apply the epilogue to a tile together: all of a block.
struct WholeBlock {
  static GPU_INLINE void sync() { __syncthreads(); }
};

// Applies the epilogue to a tile of kM rows and kN channels from `first_channel` on. `pixel[row]` is a row's place in
// the output, or negative; tile(row, column) is the address of
// a sum, and of three more from each fourth column on; only one thread reads or writes it.
// `strands` may share their memory. By the block's first kThreads threads, which `Team` brings to one point.
template <class T, int kM, int kN, int kThreads, class Team = WholeBlock, class Tile>
GPU_INLINE void apply_epilogue(
    const Epilogue<T>& f, const int* pixel, Tile tile, Strands<T, kN, kThreads>& strands, int first_channel, int group,
    int64_t slot) {
  if (f.parts != nullptr) {  // as they are: four sums, 16 bytes, a thread, and the next ones the next thread
    for (int e = threadIdx.x; e < kM * kN / 4; e += kThreads) {
      const int row = e / (kN / 4), column = e % (kN / 4) * 4, count = f.channels - first_channel - column;
      if (pixel[row] < 0 || count <= 0) continue;
      const Vec<float, 4> sums = gpu::load<4>(tile(row, column));
      float* to = f.parts + static_cast<int64_t>(pixel[row]) * f.channels + first_channel + column;
      store_floats(to, sums.v, f.vectors, count);
    }
    return;
  }
  using S = Strands<T, kN, kThreads>;
  constexpr int N = kVec<T>;
  const int column = threadIdx.x % S::kChunks * N, strand = threadIdx.x / S::kChunks;
  const int channel = first_channel + column, count = f.channels - channel;
  const bool mine = count > 0;
  const int64_t coef_row = static_cast<int64_t>(f.coef_groups) * f.channels;
  const float* coef = f.coef + static_cast<int64_t>(min(group, f.coef_groups - 1)) * f.channels + channel;
  const bool with_coef = f.kind == EpilogueKind::activate || f.kind == EpilogueKind::grad_stats;

  if (mine && with_coef && !f.act.linear) {  // the activation alone, number by number
#pragma unroll 1
    for (int row = strand; row < kM; row += S::kStrands) {
      if (pixel[row] < 0) continue;
#pragma unroll 1
      for (int i = 0; i < min(count, N); ++i) {
        float& sum = *tile(row, column + i);
        const float s = coef[i], t = coef[coef_row + i];
        if (f.kind == EpilogueKind::activate)
          sum = f.act.other_forward(sum * s + t);
        else
          sum *= f.act.other_derivative(
              gpu::to_float(f.y[static_cast<int64_t>(pixel[row]) * f.channels + channel + i]) * s + t);
      }
    }
  }

  float a[N] = {}, b[N] = {}, rows = 0;  // mean and M2, or the sums
  if (mine) {
    float s[N] = {}, t[N] = {}, mean[N] = {};
    if (f.kind == EpilogueKind::bias) {
      load_floats(t, f.coef + channel, f.vectors, count);
    } else if (with_coef) {
      load_floats(s, coef, f.vectors, count);
      load_floats(t, coef + coef_row, f.vectors, count);
      if (f.coef_rows == 4) load_floats(mean, coef + 2 * coef_row, f.vectors, count);
    }
#pragma unroll 1
    for (int row = strand; row < kM; row += S::kStrands) {
      if (pixel[row] < 0) continue;
      const int64_t at = static_cast<int64_t>(pixel[row]) * f.channels + channel;
      float v[N];
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const Vec<float, 4> sums = gpu::load<4>(tile(row, column + i));
#pragma unroll
        for (int j = 0; j < 4; ++j) v[i + j] = sums[j];
      }
      rows += 1;
      if (f.kind == EpilogueKind::bias) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += t[i];
      } else if (f.kind == EpilogueKind::activate) {
        if (f.act.linear) {
#pragma unroll
          for (int i = 0; i < N; ++i) v[i] = f.act.linear_forward(v[i] * s[i] + t[i]);
        }
      } else if (f.kind == EpilogueKind::stats) {
        const float share = 1.f / rows;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          v[i] = gpu::rounded<T>(v[i]);
          const float delta = v[i] - a[i];
          a[i] += delta * share;
          b[i] += delta * (v[i] - a[i]);
        }
      } else if (f.kind == EpilogueKind::grad_stats) {
        float y[N];
        read_chunk(y, f.y + at, f.vectors, count);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (f.act.linear) v[i] *= f.act.linear_derivative(y[i] * s[i] + t[i]);
          v[i] = gpu::rounded<T>(v[i]);
          a[i] += v[i];
          b[i] += v[i] * (y[i] - mean[i]);
        }
      }
      store_chunk(f.out + at, v, f.vectors, count);
    }
  }

  if (f.rows() == 0) return;  // the same for all threads, and the last thing they do
  Team::sync();               // all have read the tile
  if (threadIdx.x % S::kChunks == 0) strands.count[strand] = rows;
#pragma unroll
  for (int i = 0; i < N; ++i) strands.row[0][strand][column + i] = a[i], strands.row[1][strand][column + i] = b[i];
  // Threads without channels have no rows, but the first of a strand has some.
  Team::sync();
  const int own = threadIdx.x;
  if (own < kN && first_channel + own < f.channels) {
    float* to = f.partials + slot * f.rows() * f.channels + first_channel + own;
    if (f.kind == EpilogueKind::stats) {
      Moments<float> all{strands.count[0], strands.row[0][0][own], strands.row[1][0][own]};
#pragma unroll 1
      for (int i = 1; i < S::kStrands; ++i)
        all.merge(Moments<float>{strands.count[i], strands.row[0][i][own], strands.row[1][i][own]});
      to[0] = all.count, to[f.channels] = all.mean, to[2 * static_cast<int64_t>(f.channels)] = all.m2;
    } else {
      float first = 0, second = 0;
#pragma unroll 1
      for (int i = 0; i < S::kStrands; ++i) first += strands.row[0][i][own], second += strands.row[1][i][own];
      to[0] = first;
      if (f.coef_rows == 4) {
        const float* rstd = f.coef + 3 * coef_row + static_cast<int64_t>(min(group, f.coef_groups - 1)) * f.channels;
        to[f.channels] = second * rstd[first_channel + own];
      }
    }
  }
}

// --- the sum of parts ------------------------------------------------------------------------------------------------

struct ReduceSplits {
  static constexpr int kM = 32, kN = 64, kThreads = 128;
  static constexpr int kBlocks = 4;  // of a multiprocessor: said, so that nothing is spilled for more
};

template <class T>
struct ReduceSplitsShared {
  float tile[ReduceSplits::kM][ReduceSplits::kN];
  Strands<T, ReduceSplits::kN, ReduceSplits::kThreads> strands;
  int pixel[ReduceSplits::kM];
};

// Adds parts [splits, values] up in ascending order and applies the epilogue; a tile a block, `pixels` rows to a group.
template <class T>
__global__ void __launch_bounds__(ReduceSplits::kThreads, ReduceSplits::kBlocks)
    reduce_splits(const float* __restrict__ parts, int splits, int64_t values, int pixels, int tiles_per_group,
                 const Epilogue<T> f) {
  constexpr int kM = ReduceSplits::kM, kN = ReduceSplits::kN, kThreads = ReduceSplits::kThreads;
  auto& shared = gpu::shared_memory<ReduceSplitsShared<T>>();
  const int tiles_n = (f.channels + kN - 1) / kN, tile = blockIdx.x / tiles_n;
  const int first_channel = blockIdx.x % tiles_n * kN, group = tile / tiles_per_group;
  const int first = tile % tiles_per_group * kM;
  if (threadIdx.x < kM) {
    const int row = first + threadIdx.x;
    shared.pixel[threadIdx.x] = row < pixels ? group * pixels + row : -1;
  }
  gpu::await_kernels_before();
  __syncthreads();
  // Four sums a thread, and the next ones the next thread: 16 bytes each.
  for (int e = threadIdx.x; e < kM * kN / 4; e += kThreads) {
    const int row = e / (kN / 4), column = e % (kN / 4) * 4, count = f.channels - first_channel - column;
    if (shared.pixel[row] < 0 || count <= 0) continue;
    const float* from = parts + static_cast<int64_t>(shared.pixel[row]) * f.channels + first_channel + column;
    Vec<float, 4> sum{};
    float part[4];
#pragma unroll 2
    for (int split = 0; split < splits; ++split, from += values) {
      load_floats(part, from, f.vectors, count);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part[i];
    }
    gpu::store(&shared.tile[row][staged(column)], sum);
  }
  __syncthreads();
  apply_epilogue<T, kM, kN, kThreads>(
      f, shared.pixel, [&](int row, int at) { return &shared.tile[row][staged(at)]; }, shared.strands, first_channel,
      group, tile);
}

inline int reduce_splits_tiles(int pixels) { return (pixels + ReduceSplits::kM - 1) / ReduceSplits::kM; }

template <class T>
void launch_reduce_splits(
    const float* parts, int splits, int64_t values, int groups, int pixels, const Epilogue<T>& f, gpu::Stream stream) {
  const int tiles = reduce_splits_tiles(pixels), tiles_n = (f.channels + ReduceSplits::kN - 1) / ReduceSplits::kN;
  const dim3 grid(static_cast<unsigned>(groups) * tiles * tiles_n);
  gpu::launch_early(
      reduce_splits<T>, {"reduce_splits", grid, ReduceSplits::kThreads, sizeof(ReduceSplitsShared<T>), stream}, parts,
      splits, values, pixels, tiles, f);
}

}  // namespace fastdcgan::cuda
