// The contractions as implicit matrix products on tensor cores (sm_80 and later): conv [pixels, taps*C] x [taps*C, Co],
// conv_transpose the same for each output phase and without inserted zeros, weight_grad [Cl, pixels] x [pixels, C] for
// each tap. No column matrix exists: a tile of it is a tile of a tensor (Chetlur et al., "cuDNN: Efficient Primitives
// for Deep Learning", 2014, section 3).
//
// Copies to shared memory run kStages - 1 steps ahead. The prologue is applied in place, by each thread to the chunks
// that it copied itself, before the barrier after which all read them.
#pragma once

#include <type_traits>

#include "cuda/gemm/loaders.cuh"

namespace fastdcgan::cuda {

// What the operators take.
constexpr int64_t kMostPixels = int64_t{1} << 30;    // of a tensor, and its channels: a tile may reach beyond the last
constexpr int64_t kMostSplits = 1024;                // parts of the depth
constexpr int64_t kMostGeometry = int64_t{1} << 20;  // of a kernel with its dilation, a stride, a padding

// A block's share of the result, kM x kN, in steps of kK of the depth; by kWarpsM x kWarpsN warps.
template <int kM_, int kN_, int kK_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct TileShape {
  static constexpr int kM = kM_, kN = kN_, kK = kK_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // that a multiprocessor is to have room for
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
};

template <Op op, class Math_, class Shape>
struct Contraction : Shape {
  using Math = Math_;
  using T = typename Math::T;
  using Shape::kM, Shape::kN, Shape::kK, Shape::kStages, Shape::kThreads;
  static constexpr Op kOp = op;
  static constexpr int kResident = Shape::kBlocks - Math::kExact;  // the lower parts take registers

  // Both factors as they lie in memory.
  template <int kSide, bool kDepthRows>
  using Tile = MatrixTile<T, kDepthRows ? kK : kSide, kDepthRows ? kSide : kK, kDepthRows>;
  using Left = Tile<kM, op == Op::weight_grad>;
  using Right = Tile<kN, op != Op::conv>;
  using Loader = std::conditional_t<op == Op::weight_grad, ChannelLoader<Contraction>, PixelLoader<Contraction>>;

  static constexpr int kWarpM = kM / Shape::kWarpsM, kWarpN = kN / Shape::kWarpsN;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0 && kK % Math::kDepth == 0);
  static_assert(Left::kRows * Left::kChunks % kThreads == 0 && Right::kRows * Right::kChunks % kThreads == 0);
  static_assert(Loader::kBits * (kStages - 1) <= 32, "the valid chunks of the stages under way are one word");

  static constexpr int kPadding = 8;  // so that the rows of one store fall into different banks
  struct alignas(128) Shared {
    union {
      struct {
        Left left[kStages];
        Right right[kStages];
      };
      float sums[kM][kN + kPadding];
      Strands<T, kN, kThreads> strands;
    };
    TilePlace<kM> place;

    // bn_backward's second tensors follow, those of the left factor first, where there are any.
    GPU_INLINE Left* left_y() { return reinterpret_cast<Left*>(this + 1); }
    GPU_INLINE Right* right_y(bool after_left) { return reinterpret_cast<Right*>(left_y() + after_left * kStages); }
  };

  static size_t shared_bytes(const Problem<T>& p) {
    const bool left = op == Op::weight_grad ? p.other.y != nullptr : p.gathered.y != nullptr;
    const bool right = op == Op::weight_grad && p.gathered.y != nullptr;
    return sizeof(Shared) + kStages * (left * sizeof(Left) + right * sizeof(Right));
  }
};

// grid (tiles, splits)
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kResident) contraction(const Problem<typename C::T> p) {
  auto& shared = gpu::shared_memory<typename C::Shared>();
  const typename C::Loader loader(p, shared.place);
  constexpr int kAhead = C::kStages - 1, kBits = C::Loader::kBits;
  const auto next = [](int slot) { return slot + 1 == C::kStages ? 0 : slot + 1; };

  float sum[C::kWarpM / 16][C::kWarpN / 8][4] = {};
  const int warp = threadIdx.x / 32;
  const int first_m = warp / C::kWarpsN * C::kWarpM, first_n = warp % C::kWarpsN * C::kWarpN;

  gpu::await_kernels_before();
  typename C::Loader::Step step = loader.first(), ahead = step;
  unsigned valid = 0;  // of the steps under way, the last in the lowest bits
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    valid <<= kBits;
    if (i < loader.steps) {
      valid |= loader.load(shared, i, ahead);
      loader.advance(ahead);
    }
    gpu::copy_async_commit();
  }
  for (int i = 0, slot = 0, free = kAhead; i < loader.steps; ++i, slot = next(slot), free = next(free)) {
    gpu::copy_async_wait<kAhead - 1>();
    if (loader.has_prologue()) loader.prologue(shared, slot, step, valid >> (kAhead - 1) * kBits);
    __syncthreads();  // the step is there for all; all have done with the slot that is loaded next
    valid <<= kBits;
    if (i + kAhead < loader.steps) {
      valid |= loader.load(shared, free, ahead);
      loader.advance(ahead);
    }
    gpu::copy_async_commit();
    loader.advance(step);
#pragma unroll
    for (int k = 0; k < C::kK; k += C::Math::kDepth)
      multiply_step<typename C::Math>(sum, shared.left[slot], shared.right[slot], first_m, first_n, k);
  }
  gpu::copy_async_wait<0>();
  __syncthreads();  // the sums take over the stages' memory

  const int line = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < C::kWarpM / 16; ++m)
#pragma unroll
    for (int n = 0; n < C::kWarpN / 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        gpu::store(&shared.sums[first_m + m * 16 + h * 8 + line][staged(first_n + n * 8 + pair)],
                   Vec<float, 2>{{sum[m][n][h * 2], sum[m][n][h * 2 + 1]}});
  __syncthreads();
  Epilogue<typename C::T> epilogue = p.epilogue;
  if (epilogue.parts != nullptr) epilogue.parts += static_cast<int64_t>(blockIdx.y) * p.values;
  apply_epilogue<typename C::T, C::kM, C::kN, C::kThreads>(
      epilogue, shared.place.pixel, [&](int row, int column) { return &shared.sums[row][staged(column)]; }, shared.strands,
      shared.place.first_channel, shared.place.group, shared.place.slot);
}

// conv, conv_transpose: tiles of `rows` pixels that cover a group's output, or a phase of it.
template <Op op, class T>
int tiles_of_group(const Problem<T>& p, int rows) {
  const auto divided = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t apart_y = op == Op::conv ? 1 : p.rows.stride, apart_x = op == Op::conv ? 1 : p.columns.stride;
  const int64_t pixels = divided(p.rows.pixels, apart_y) * divided(p.columns.pixels, apart_x);
  return static_cast<int>(divided(p.batch * pixels, rows));
}

// Rows of pixels to a statistics group of the output; of weight_grad's, that has one group, rows of (channel, tap).
template <Op op, class T>
int64_t rows_of_group(const Problem<T>& p) {
  if (op == Op::weight_grad) return int64_t{p.other.channels} * p.rows.kernel * p.columns.kernel;
  return int64_t{p.batch} * p.rows.pixels * p.columns.pixels;
}

// Slots of a group's partials, with tiles of `rows` pixels.
template <Op op, class T>
int64_t partial_slots(const Problem<T>& p, int rows) {
  if (p.splits > 1) return reduce_splits_tiles(static_cast<int>(rows_of_group<op>(p)));
  return int64_t{tiles_of_group<op>(p, rows)} * (op == Op::conv ? 1 : p.phases());
}

// Floats of the workspace that `splits` parts need, 0 without any.
template <Op op, class T>
int64_t workspace_size(const Problem<T>& p) {
  const int64_t groups = op == Op::weight_grad ? 1 : p.groups;
  return p.splits > 1 ? p.splits * groups * rows_of_group<op>(p) * p.epilogue.channels : 0;
}

// Whether every row of `channels` T of all these tensors begins at a multiple of 16 bytes.
template <class T, class... Pointers>
bool in_vectors(int channels, Pointers... tensors) {
  return channels % kVec<T> == 0 && (gpu::aligned(tensors) && ...);
}

template <Op op, class T>
void set_vectors(Problem<T>& p, const float* workspace) {
  const auto set = [](Operand<T>& o) { o.vectors = in_vectors<T>(o.channels, o.x, o.y, o.coef); };
  Epilogue<T>& f = p.epilogue;
  set(p.gathered);
  if (op == Op::weight_grad)
    set(p.other);
  else
    p.other.vectors = in_vectors<T>(op == Op::conv ? p.gathered.channels : f.channels, p.other.x);
  f.vectors = in_vectors<T>(f.channels, f.out, f.y, f.coef, workspace);
}

constexpr const char* kOpNames[] = {"conv", "conv_transpose", "weight_grad"};

// Calls run(), which launches `p`: with one part for its own result, else for the parts, which are added up then.
template <Op op, class T, class Run>
void with_parts(Problem<T>& p, float* workspace, gpu::Stream stream, Run run) {
  const Epilogue<T> whole = p.epilogue;
  if (p.splits > 1) {
    p.values = workspace_size<op>(p) / p.splits;
    p.epilogue = Epilogue<T>{};
    p.epilogue.parts = workspace, p.epilogue.channels = whole.channels, p.epilogue.vectors = whole.vectors;
  }
  run();
  if (p.splits > 1)
    launch_reduce_splits(workspace, p.splits, p.values, op == Op::weight_grad ? 1 : p.groups,
                        static_cast<int>(rows_of_group<op>(p)), whole, stream);
}

// Runs a contraction. `p` has everything but `vectors`, the tiles and the parts; `workspace` has workspace_size floats.
template <class C>
void run_contraction(Problem<typename C::T> p, float* workspace, gpu::Stream stream) {
  constexpr Op op = C::kOp;
  const auto divided = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int taps = p.rows.kernel * p.columns.kernel;
  set_vectors<op>(p, workspace);
  p.tiles_n = static_cast<int>(divided(p.epilogue.channels, C::kN));
  int64_t blocks;
  if (op == Op::weight_grad) {
    p.tiles_m = static_cast<int>(divided(p.other.channels, C::kM));
    p.per_image = Divider(p.rows.pixels * p.columns.pixels), p.per_row = Divider(p.columns.pixels);
    blocks = int64_t{p.tiles_m} * p.tiles_n * taps;
  } else {
    p.tiles_m = tiles_of_group<op>(p, C::kM);
    blocks = int64_t{p.groups} * p.tiles_m * p.tiles_n * (op == Op::conv ? 1 : p.phases());
  }
  with_parts<op>(p, workspace, stream, [&] {
    const dim3 grid(static_cast<unsigned>(blocks), p.splits);
    gpu::launch_early(contraction<C>, {kOpNames[static_cast<int>(op)], grid, C::kThreads, C::shared_bytes(p), stream},
                      p);
  });
}

}  // namespace fastdcgan::cuda
