// The contractions of contraction.cuh for sm_90a: one warp has TMA tiles of tensors copied to a ring of stages, two
// warpgroups multiply them, 64 rows each, and apply the epilogue to the tile together. Only 16-bit numbers, and what
// the copy engine can describe: why_not_tma says what it can't.
//
// A prologue of conv and conv_transpose is applied in registers, from where the left factor is then multiplied; those
// of weight_grad in shared memory, where both factors are read as without one.
#pragma once

#include "cuda/device/wgmma.h"
#include "cuda/gemm/contraction.cuh"
#include "cuda/gemm_sm90/tma_tiles.cuh"

namespace fastdcgan::cuda {

// kN columns of a tile; blocks of a multiprocessor, each with a ring of kRing bytes, or with all of that where it has
// the multiprocessor to itself.
template <int kN_, int kBlocks_, int kRing_>
struct Sm90Shape {
  static constexpr int kM = 128, kN = kN_, kK = 64, kBlocks = kBlocks_, kRing = kRing_;
};

// kTransforms: with a prologue.
template <Op op, class T_, class Shape, bool kTransforms_>
struct Sm90Contraction : Shape {
  using T = T_;
  static constexpr Op kOp = op;
  static constexpr bool kTransforms = kTransforms_;
  using Shape::kM, Shape::kN, Shape::kK;
  // A prologue takes registers: of 128 columns and more, one block has all of a multiprocessor's; of 256, those that
  // multiply have those of the warps that copy too.
  static constexpr int kBlocks = kTransforms && kN > 64 ? 1 : Shape::kBlocks;
  static constexpr int kRing = Shape::kRing * (Shape::kBlocks / kBlocks);
  static constexpr bool kUneven = kTransforms && kN > 128;
  static constexpr int kConsumers = 256, kThreads = kConsumers + (kUneven ? 128 : 32);
  static constexpr int kRegisters = 240, kRegistersOfCopies = 24;  // where they are uneven, of 504 = 3 * 168

  static constexpr int kPanel = 64 * 64 * static_cast<int>(sizeof(T));  // 64 rows of 64 numbers
  static constexpr int kLeftBytes = kM / 64 * kPanel, kRightBytes = kN / 64 * kPanel;
  static constexpr int kMostRing = kRing * kBlocks, kMostStages = kMostRing / (kLeftBytes + kRightBytes);
  static_assert(sizeof(T) == 2 && kN % 64 == 0 && kN <= 256 && kRing % 1024 == 0);
  static_assert(kRing >= 2 * (1 + kTransforms) * (kLeftBytes + kRightBytes), "one stage is multiplied, one awaited");
  using Left = MatrixTile<T, kM, kK, false>;  // of conv and conv_transpose, as the copy engine swizzles it
  using Loader = std::conditional_t<op == Op::weight_grad, TmaChannelLoader<Sm90Contraction>,
                                   TmaPixelLoader<Sm90Contraction>>;

  // How the factors lie: the depth along the rows, or across them, and the bytes of 16 steps of it.
  static constexpr bool kLeftAcross = op == Op::weight_grad, kRightAcross = op != Op::conv;
  static constexpr int kLeftStep = kLeftAcross ? 16 * 128 : 32, kRightStep = kRightAcross ? 16 * 128 : 32;

  static constexpr int kPadding = 8;
  struct alignas(1024) Shared {
    gpu::Mbarrier full[kMostStages], empty[kMostStages];
    TilePlace<kM> place;
    union alignas(1024) {
      unsigned char ring[kRing];  // the last: there may be more of it
      float sums[kM][kN + kPadding];
      Strands<T, kN, kConsumers> strands;
    };
  };
  static_assert(sizeof(Shared) <= 228 * 1024 / kBlocks - 1024, "a multiprocessor has 228 KiB, a block's own is 1");
  static_assert(sizeof(Shared) + kMostRing - kRing <= 227 * 1024, "a block has 227 KiB at most");

  GPU_HOST_INLINE static int stage_bytes(const Problem<T>& p) {
    const bool y_of_gathered = p.gathered.y != nullptr;
    if (op != Op::weight_grad) return kLeftBytes * (1 + y_of_gathered) + kRightBytes;
    return kLeftBytes * (1 + (p.other.y != nullptr)) + kRightBytes * (1 + y_of_gathered);
  }
};

// The threads that multiply, without the warp that copies.
template <class C>
struct Consumers {
  static GPU_INLINE void sync() { gpu::named_barrier(1, C::kConsumers); }
};

// Stages of the ring, one after the other, and the parity of the phase that each is in.
struct RingPlace {
  int slot = 0, parity = 0;
  bool hangs = false;

  // Waits for the barrier of the stage, of one phase before with `before`; false where it hangs.
  GPU_INLINE bool await(gpu::Mbarrier* barriers, int before = 0) {
    hangs = !gpu::mbarrier_wait(&barriers[slot], parity ^ before);
    return !hangs;
  }
  GPU_INLINE void advance(int stages) {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
};

// The prologue on a fragment of the left factor: numbers of channels `channel`, + 1, + 8 and + 9 of two rows.
template <class T>
GPU_INLINE void apply_prologue(const Operand<T>& o, unsigned (&x)[4], const unsigned (&y)[4], const float* coef,
                               int channel, bool first_inside, bool second_inside) {
  const int64_t row = static_cast<int64_t>(o.groups) * o.channels;
  const auto number = [](unsigned pair, int i) { return gpu::to_float(T{static_cast<uint16_t>(pair >> 16 * i)}); };
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const int at = channel + q * 8;
    const bool there = at < o.channels;
    Vec<float, 2> s{}, t{}, u{}, v{};
    if (there) s = gpu::load<2>(coef + at), t = gpu::load<2>(coef + row + at);
    if (there && o.affine) u = gpu::load<2>(coef + 2 * row + at), v = gpu::load<2>(coef + 3 * row + at);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      unsigned& pair = x[q * 2 + h];
      unsigned result = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = number(pair, i);
        float to;
        if (o.prologue == Prologue::activate) {
          to = o.act.linear_forward(value * s[i] + t[i]);
        } else {
          const float raw = number(y[q * 2 + h], i);
          to = s[i] * o.act.linear_derivative(raw * s[i] + t[i]) * value;
          if (o.affine) to += u[i] * raw + v[i];
        }
        result |= static_cast<unsigned>(gpu::from_float<T>(to).bits) << 16 * i;
      }
      pair = there && (h == 0 ? first_inside : second_inside) ? result : 0;
    }
  }
}

// The sums with a prologue: each warp reads its 16 rows of the left factor, and multiplies them from registers.
template <class C, class T>
GPU_INLINE void multiply_transformed(
    const TmaProblem<T>& w, const typename C::Loader& loader, typename C::Shared& shared, float (&sum)[C::kN / 2]) {
  const Operand<T>& operand = w.p.gathered;
  const bool second = operand.y != nullptr;
  const int bytes = C::stage_bytes(w.p), lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
  const float* coef = operand.coef_of(loader.group());
  const auto above = loader.pixel(first_row + lane / 4), below = loader.pixel(first_row + lane / 4 + 8);
  typename C::Loader::Step step = loader.first();
  RingPlace at;
  for (int i = 0; i < loader.steps; ++i, at.advance(w.stages), loader.advance(step)) {
    const bool above_inside = loader.inside(above, step), below_inside = loader.inside(below, step);
    if (!at.await(shared.full)) break;
    const unsigned char* stage = shared.ring + at.slot * bytes;
    const auto& left = *reinterpret_cast<const typename C::Left*>(stage);
    const auto& left_y = *reinterpret_cast<const typename C::Left*>(stage + C::kLeftBytes);
    unsigned numbers[C::kK / 16][4];
#pragma unroll
    for (int k = 0; k < C::kK / 16; ++k) {
      unsigned y[4] = {};
      left_fragment(left, first_row, k * 16, numbers[k]);
      if (second) left_fragment(left_y, first_row, k * 16, y);
      apply_prologue(operand, numbers[k], y, coef, step.channel + k * 16 + lane % 4 * 2, above_inside, below_inside);
    }
    const uint64_t right =
        gpu::matrix_descriptor(stage + C::kLeftBytes * (1 + second), C::kRightAcross ? C::kPanel : 0);
    gpu::hold(sum);
#pragma unroll
    for (int k = 0; k < C::kK / 16; ++k) gpu::hold(numbers[k]);
    gpu::wgmma_fence();
#pragma unroll
    for (int k = 0; k < C::kK / 16; ++k)
      gpu::wgmma_multiply<C::kRightAcross>(T{}, sum, numbers[k], gpu::advanced(right, k * C::kRightStep));
    gpu::wgmma_commit();
    gpu::wgmma_wait<0>();
    gpu::hold(sum);
#pragma unroll
    for (int k = 0; k < C::kK / 16; ++k) gpu::hold(numbers[k]);
    gpu::fence_async();  // what was read is copied to next
    __syncwarp();
    if (lane == 0) gpu::mbarrier_arrive(&shared.empty[at.slot]);
  }
  if (at.hangs) gpu::hangs(w.hang, gpu::Hang::full, at.slot, at.parity);
}

// grid (tiles, splits)
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    sm90_contraction(const __grid_constant__ TmaProblem<typename C::T> w) {
  if constexpr (!gpu::kHasWgmma) {
    gpu::trap();
  } else {
    using T = typename C::T;
    auto& shared = gpu::shared_memory<typename C::Shared>();
    const Problem<T>& p = w.p;
    const int bytes = C::stage_bytes(p), thread = threadIdx.x, lane = thread % 32;
    if (thread == 0) {
      for (int i = 0; i < w.stages; ++i)
        gpu::mbarrier_init(&shared.full[i], 1), gpu::mbarrier_init(&shared.empty[i], C::kConsumers / 32);
      gpu::mbarrier_init_done();
    }
    if (thread == C::kConsumers) C::Loader::prefetch(w);
    const typename C::Loader loader(w);
    __syncthreads();
    gpu::await_kernels_before();

    typename C::Loader::Step step = loader.first();
    RingPlace at;
    if (thread >= C::kConsumers) {
      if constexpr (C::kUneven) gpu::give_registers<C::kRegistersOfCopies>();
      if (thread == C::kConsumers) {
        for (int i = 0; i < loader.steps; ++i, at.advance(w.stages)) {
          if (!at.await(shared.empty, 1)) break;
          gpu::mbarrier_arrive_expect(&shared.full[at.slot], bytes);
          loader.load(shared.ring + at.slot * bytes, &shared.full[at.slot], step);
          loader.advance(step);
        }
        if (at.hangs) gpu::hangs(w.hang, gpu::Hang::empty, at.slot, at.parity ^ 1);
      }
    } else {
      if constexpr (C::kUneven) gpu::take_registers<C::kRegisters>();
      loader.find_place(shared.place, thread);
      float sum[C::kN / 2] = {};
      const int warpgroup = thread / 128;
      if constexpr (C::kTransforms && C::kOp != Op::weight_grad) {
        multiply_transformed<C>(w, loader, shared, sum);
      } else {
        const int left_bytes = C::kLeftBytes * (C::kOp == Op::weight_grad && p.other.y != nullptr ? 2 : 1);
        for (int i = 0, before = 0; i < loader.steps; ++i, before = at.slot, at.advance(w.stages)) {
          if (!at.await(shared.full)) break;
          unsigned char* stage = shared.ring + at.slot * bytes;
          if constexpr (C::kTransforms) {
            loader.transform(stage, step, thread);
            loader.advance(step);
            gpu::fence_async();
            Consumers<C>::sync();  // the factors are there for all
          }
          const uint64_t left = gpu::matrix_descriptor(stage + warpgroup * C::kPanel);
          const uint64_t right = gpu::matrix_descriptor(stage + left_bytes, C::kRightAcross ? C::kPanel : 0);
          gpu::hold(sum);
          gpu::wgmma_fence();
#pragma unroll
          for (int k = 0; k < C::kK / 16; ++k)
            gpu::wgmma_multiply<C::kLeftAcross, C::kRightAcross>(
                T{}, sum, gpu::advanced(left, k * C::kLeftStep), gpu::advanced(right, k * C::kRightStep));
          gpu::wgmma_commit();
          gpu::wgmma_wait<1>();
          gpu::hold(sum);
          if (i > 0 && lane == 0) gpu::mbarrier_arrive(&shared.empty[before]);  // the step before is multiplied
        }
        gpu::wgmma_wait<0>();
        gpu::hold(sum);
        if (at.hangs) gpu::hangs(w.hang, gpu::Hang::full, at.slot, at.parity);
      }
      Consumers<C>::sync();  // the sums take over the ring's memory

      const int first = warpgroup * 64 + thread % 128 / 32 * 16 + lane / 4, pair = lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < C::kN / 8; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          gpu::store(&shared.sums[first + h * 8][staged(n * 8 + pair)],
                     Vec<float, 2>{{sum[n * 4 + h * 2], sum[n * 4 + h * 2 + 1]}});
      Consumers<C>::sync();
      Epilogue<T> epilogue = p.epilogue;
      if (epilogue.parts != nullptr) epilogue.parts += static_cast<int64_t>(blockIdx.y) * p.values;
      apply_epilogue<T, C::kM, C::kN, C::kConsumers, Consumers<C>>(
          epilogue, shared.place.pixel, [&](int row, int column) { return &shared.sums[row][staged(column)]; }, shared.strands,
          shared.place.first_channel, shared.place.group, shared.place.slot);
    }
  }
}

// --- on the host -----------------------------------------------------------------------------------------------------

// Why the copy engine can't describe this problem, or nullptr.
template <Op op, class T>
const char* why_not_tma(const Problem<T>& p) {
  const Operand<T>& a = p.gathered;
  const bool linear = op == Op::weight_grad;
  if (!in_vectors<T>(a.channels, a.x, a.y, a.coef)) return "rows of the input that are not whole vectors";
  const int right = op == Op::conv ? a.channels : linear ? p.other.channels : p.epilogue.channels;
  if (!in_vectors<T>(right, p.other.x, p.other.y, p.other.coef))
    return "rows of the other factor that are not whole vectors";
  if (a.prologue != Prologue::none && !linear && !a.act.linear) return "a prologue that has no form in registers";
  if (op != Op::conv_transpose) {
    if (p.rows.size % p.rows.stride != 0 || p.columns.size % p.columns.stride != 0)
      return "an image that is no multiple of the stride";
    if (op == Op::conv && p.columns.stride > 1 && a.channels % 64 != 0)
      return "a stride, and channels in no multiple of 64";
  }
  if (linear) {
    const PixelTile tile = pixel_tile(64, p.rows.pixels, p.columns.pixels);
    if (p.rows.pixels % tile.rows != 0 || p.columns.pixels % tile.columns != 0) return "pixels that fill no TMA tiles";
  }
  return nullptr;
}

inline int tiles_along(int pixels, int of) { return (pixels + of - 1) / of; }

// The TMA tile of a tile, and tiles of a group or phase (weight_grad: steps of the depth).
template <Op op, class T>
void set_tma_tiles(TmaProblem<T>& w) {
  const Problem<T>& p = w.p;
  const bool phases = op == Op::conv_transpose;
  const int rows = tiles_along(p.rows.pixels, phases ? p.rows.stride : 1);
  const int columns = tiles_along(p.columns.pixels, phases ? p.columns.stride : 1);
  w.set_tma_tile(pixel_tile(op == Op::weight_grad ? 64 : 128, rows, columns));
  w.tiles.images = tiles_along(op == Op::weight_grad ? p.groups * p.batch : p.batch, w.tma_tile.images);
  w.tiles.rows = tiles_along(rows, w.tma_tile.rows), w.tiles.columns = tiles_along(columns, w.tma_tile.columns);
}

// The same as partial_slots, for these contractions.
template <Op op, class T>
int64_t sm90_slots(const Problem<T>& p) {
  if (p.splits > 1) return partial_slots<op>(p, 0);
  TmaProblem<T> w;
  w.p = p;
  set_tma_tiles<op>(w);
  return int64_t{w.tiles.images} * w.tiles.rows * w.tiles.columns * (op == Op::conv_transpose ? p.phases() : 1);
}

// The same as run_contraction, for problems that why_not_tma has nothing against.
template <class C>
void run_sm90(const Problem<typename C::T>& problem, float* workspace, gpu::Stream stream) {
  using T = typename C::T;
  constexpr Op op = C::kOp;
  if (const char* why = why_not_tma<op>(problem)) throw std::invalid_argument(std::string("no TMA tiles for ") + why);
  TmaProblem<T> w;
  w.p = problem;
  Problem<T>& p = w.p;
  set_vectors<op>(p, workspace);
  set_tma_tiles<op>(w);
  const Operand<T>& a = p.gathered;
  const bool shifted = op != Op::conv_transpose;  // by the stride; else the output is
  const int stride_y = shifted ? p.rows.stride : 1, stride_x = shifted ? p.columns.stride : 1;
  w.hang = gpu::hang_note();
  w.stride_y = Divider(stride_y), w.stride_x = Divider(stride_x), w.batch = Divider(p.batch);
  const int images = p.groups * p.batch, taps = p.rows.kernel * p.columns.kernel;
  const auto gathered = [&](const T* from) {
    return gpu::tensor_map(
        from, pixel_view(images, p.rows.size, p.columns.size, a.channels, stride_y, stride_x, w.tma_tile));
  };
  p.tiles_n = tiles_along(p.epilogue.channels, C::kN);
  int64_t blocks = p.tiles_n;
  if constexpr (op == Op::weight_grad) {
    const int channels = p.other.channels;
    w.left = gpu::tensor_map(
        p.other.x, pixel_view(images, p.rows.pixels, p.columns.pixels, channels, 1, 1, w.tma_tile));
    if (p.other.y != nullptr)
      w.left_y = gpu::tensor_map(
          p.other.y, pixel_view(images, p.rows.pixels, p.columns.pixels, channels, 1, 1, w.tma_tile));
    w.right = gathered(a.x);
    if (a.y != nullptr) w.right_y = gathered(a.y);
    p.tiles_m = tiles_along(channels, C::kM);
    blocks *= int64_t{p.tiles_m} * taps;
  } else {
    const int co = p.epilogue.channels;
    w.left = gathered(a.x);
    if (a.y != nullptr) w.left_y = gathered(a.y);
    w.right = gpu::tensor_map(p.other.x, op == Op::conv ? weight_view(co, taps, a.channels, C::kN)
                                                        : weight_view(a.channels, taps, co, C::kK));
    p.tiles_m = w.tiles.images * w.tiles.rows * w.tiles.columns;
    blocks *= int64_t{p.groups} * p.tiles_m * (op == Op::conv ? 1 : p.phases());
  }
  with_parts<op>(p, workspace, stream, [&] {
    const dim3 grid(static_cast<unsigned>(blocks), p.splits);
    const int ring = blocks * p.splits <= gpu::multiprocessors() ? C::kMostRing : C::kRing;
    w.stages = ring / C::stage_bytes(p);
    gpu::launch_early(
        sm90_contraction<C>,
        {kOpNames[static_cast<int>(op)], grid, C::kThreads, sizeof(typename C::Shared) + ring - C::kRing, stream}, w);
  });
}

}  // namespace fastdcgan::cuda
