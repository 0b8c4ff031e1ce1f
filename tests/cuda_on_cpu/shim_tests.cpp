// The shim itself: what each built-in returns, what numbers convert to, what a launch refuses.
#include "cuda/gemm/epilogue.cuh"
#include "harness.h"

namespace gpu = fastdcgan::gpu;
using gpu::bf16, gpu::fp16, gpu::from_float, gpu::to_float;
using test::Buffer, test::require;

// --- warp collectives and barriers -----------------------------------------------------------------------------------

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x % 32;
  const int votes = static_cast<int>(__ballot_sync(~0u, lane % 3 == 0));
  const int got[] = {
      __shfl_sync(~0u, lane, 5),
      __shfl_xor_sync(~0u, lane, 16),
      __shfl_down_sync(~0u, lane, 3),
      __shfl_up_sync(~0u, lane, 3),
      __shfl_down_sync(~0u, lane, 1, 8),
      votes,
      lane < 16 ? __shfl_xor_sync(0x0000FFFFu, lane, 1) : 0,
      __any_sync(~0u, lane == 7) * 2 + __all_sync(~0u, lane == 7),
  };
  for (int i = 0; i < 8; ++i) out[i * blockDim.x + threadIdx.x] = got[i];
}

std::string check_shuffles() {
  Buffer<int> out("out", 8 * 64);
  gpu::launch(shuffles, {"shuffles", 1, 64}, out.data());
  for (int t = 0; t < 64; ++t) {
    const int l = t % 32;
    const int want[] = {5, l ^ 16, l + 3 < 32 ? l + 3 : l, l >= 3 ? l - 3 : l, l % 8 < 7 ? l + 1 : l, 0x49249249,
                        l < 16 ? l ^ 1 : 0, 2};
    for (int i = 0; i < 8; ++i)
      require(out[i * 64 + t] == want[i], "shuffle " + std::to_string(i) + " of thread " + std::to_string(t));
  }
  return test::bytes(out);
}

struct Pairs {
  int value[64];
};

__global__ void swap_in_warp(int* out) {
  auto& pairs = gpu::shared_memory<Pairs>();
  pairs.value[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = pairs.value[threadIdx.x ^ 1];
}

std::string check_syncwarp() {
  Buffer<int> out("out", 64);
  gpu::launch(swap_in_warp, {"swap_in_warp", 1, 64, sizeof(Pairs)}, out.data());
  for (int t = 0; t < 64; ++t) require(out[t] == (t ^ 1), "swap");
  return test::bytes(out);
}

__global__ void coordinates(int* out) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * 64 + thread] = block * 64 + thread;
}

std::string check_coordinates() {
  Buffer<int> out("out", 2 * 3 * 4 * 64);
  gpu::launch(coordinates, {"coordinates", dim3(2, 3, 4), dim3(8, 4, 2)}, out.data());
  for (size_t i = 0; i < out.size(); ++i) require(out[i] == static_cast<int>(i), "coordinates");
  return test::bytes(out);
}

__global__ void barriers(int times) {
  for (int i = 0; i < times; ++i) __syncthreads();
}

std::string check_refused() {
  const gpu::Launch refused[] = {
      {"a part of a warp", 1, 33},
      {"no block", 0, 32},
      {"too many threads", 1, 2048},
      {"too much shared memory", 1, 32, 1 << 20},
      {"too many blocks", dim3(1, 1 << 16), 32},
  };
  for (const gpu::Launch& bad : refused) {
    bool thrown = false;
    try {
      gpu::launch(barriers, bad, 1);
    } catch (const cuda_on_cpu::KernelError&) {
      thrown = true;
    }
    require(thrown, bad.name);
  }
  return {};
}

// --- numbers ---------------------------------------------------------------------------------------------------------

// All 65536, back from float as they were, and the midpoints of neighbours to the even one.
template <class T>
std::string check_numbers() {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const T x{static_cast<uint16_t>(bits)};
    const float value = to_float(x);
    if (value != value) {
      const float again = to_float(from_float<T>(value));
      require(again != again, "NaN stays NaN");
      continue;
    }
    require(from_float<T>(value).bits == bits, "round trip of " + std::to_string(bits));
    const T above{static_cast<uint16_t>(bits + 1)};
    const float next = to_float(above);
    if (!(std::abs(next) > std::abs(value)) || !std::isfinite(next)) continue;
    const float middle = value + (next - value) / 2;
    const T even = bits % 2 ? above : x;
    require(from_float<T>(middle).bits == even.bits, "tie after " + std::to_string(bits));
    require(from_float<T>(std::nextafter(middle, value)).bits == x.bits, "below the middle");
    require(from_float<T>(std::nextafter(middle, next)).bits == above.bits, "above the middle");
  }
  const float infinity = std::numeric_limits<float>::infinity(), largest = std::numeric_limits<float>::max();
  require(to_float(from_float<T>(largest)) == infinity && to_float(from_float<T>(-largest)) == -infinity, "overflow");
  return {};
}

std::string check_known_numbers() {
  require(to_float(fp16{0x3C00}) == 1 && to_float(fp16{0xC000}) == -2 && to_float(fp16{0x7BFF}) == 65504, "fp16");
  require(to_float(fp16{0x0001}) == 0x1p-24f && to_float(fp16{0x0400}) == 0x1p-14f, "small fp16");
  require(from_float<fp16>(65519.f).bits == 0x7BFF && from_float<fp16>(65520.f).bits == 0x7C00, "largest fp16");
  require(to_float(bf16{0x3F80}) == 1 && to_float(bf16{0xC040}) == -3, "bf16");
  return {};
}

// --- asynchronous copies and tensor cores ----------------------------------------------------------------------------

struct Tiles {
  bf16 a[16][16], b[16][16];
};

// out[m][n] = sum over k of a[m][k] * b[n][k], one warp. With `rows` below 16 the others of `a` are zeros.
__global__ void product(const bf16* a, const bf16* b, int rows, float* out) {
  auto& tiles = gpu::shared_memory<Tiles>();
  const int lane = threadIdx.x, row = lane / 2, half = lane % 2 * 8;
  gpu::copy_async(&tiles.a[row][half], row < rows ? a + row * 16 + half : a, row < rows);
  gpu::copy_async_commit();
  gpu::copy_async(&tiles.b[row][half], b + row * 16 + half, true);
  gpu::copy_async_commit();
  gpu::copy_async_wait<1>();
  gpu::copy_async_wait<0>();
  __syncthreads();
  unsigned fa[4], fb[4];
  gpu::load_matrix(fa, &tiles.a[lane % 8 + lane / 8 % 2 * 8][lane / 16 * 8]);
  gpu::load_matrix(fb, &tiles.b[lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
  for (int n = 0; n < 2; ++n) {
    float c[4] = {};
    const unsigned half_of_b[2] = {fb[2 * n], fb[2 * n + 1]};
    gpu::multiply_add(bf16{}, c, fa, half_of_b);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 16 + n * 8 + lane % 4 * 2 + i % 2] = c[i];
  }
}

std::string check_product(int rows) {
  Buffer<bf16> a("a", rows * 16, test::Flush::end, 16), b("b", 256, test::Flush::end, 16);
  Buffer<float> out("out", 256);
  test::fill(a, 1), test::fill(b, 2);
  gpu::launch(product, {"product", 1, 32, sizeof(Tiles)}, a.data(), b.data(), rows, out.data());
  const auto want = [&](size_t i) {
    double sum = 0;
    for (size_t k = 0; k < 16 && i / 16 < size_t(rows); ++k)
      sum += double(to_float(a[i / 16 * 16 + k])) * to_float(b[i % 16 * 16 + k]);
    return sum;
  };
  test::compare("product", out, want, 1e-6);
  return test::bytes(out);
}

// --- shared memory ---------------------------------------------------------------------------------------------------

// A column's place is its own, and eight threads that read four numbers each touch every bank once: of rows of chunks of
// 4 columns, and of the first and the second four of chunks of 8.
std::string check_banks() {
  using fastdcgan::cuda::staged;
  std::vector<bool> taken(256);
  for (int column = 0; column < 256; ++column) taken[static_cast<size_t>(staged(column))] = true;
  require(std::count(taken.begin(), taken.end(), true) == 256, "two columns in one place");
  for (const int chunk : {4, 8})
    for (int first = 0; first < 256; first += 8 * chunk)
      for (int part = 0; part < chunk; part += 4) {
        unsigned banks = 0;
        for (int thread = 0; thread < 8; ++thread) banks |= 1u << staged(first + thread * chunk + part) / 4 % 8;
        require(banks == 0xFF, "a bank is read twice");
      }
  return {};
}

int main() {
  bool ok = true;
  ok &= test::run("warp collectives", check_shuffles);
  ok &= test::run("__syncwarp", check_syncwarp);
  ok &= test::run("coordinates", check_coordinates);
  ok &= test::run("launches that are refused", check_refused);
  ok &= test::run("fp16 of and to float", check_numbers<fp16>);
  ok &= test::run("bf16 of and to float", check_numbers<bf16>);
  ok &= test::run("known numbers", check_known_numbers);
  ok &= test::run("matrix product", [] { return check_product(16); });
  ok &= test::run("matrix product with rows of zeros", [] { return check_product(13); });
  ok &= test::run("banks of shared memory", check_banks);
  return ok ? 0 : 1;
}
