// Kernels in two forms, right and with a bug planted: the shim has to pass the one and catch the other.
//
//     planted_bugs NAME right|wrong
#include <cstring>
#include <map>

#include "cuda/device/tensor_core.h"
#include "harness.h"

namespace gpu = fastdcgan::gpu;
using test::Buffer, test::Flush;

constexpr int kThreads = 64;

struct Numbers {
  int value[kThreads];
};

struct Words {
  uint64_t value[2 * kThreads];
};

// --- barriers --------------------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void missing_barrier(int* out) {
  auto& shared = gpu::shared_memory<Numbers>();
  shared.value[threadIdx.x] = threadIdx.x;
  if constexpr (!kWrong) __syncthreads();
  out[threadIdx.x] = shared.value[kThreads - 1 - threadIdx.x];
}

template <bool kWrong>
__global__ void missing_barrier_before_reuse(int* out) {
  auto& shared = gpu::shared_memory<Numbers>();
  int sum = 0;
  for (int i = 0; i < 3; ++i) {
    shared.value[threadIdx.x] = threadIdx.x + i;
    __syncthreads();
    sum += shared.value[(threadIdx.x + 32) % kThreads];
    if constexpr (!kWrong) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool kWrong>
__global__ void missing_syncwarp(int* out) {
  auto& shared = gpu::shared_memory<Numbers>();
  shared.value[threadIdx.x] = threadIdx.x;
  if constexpr (!kWrong) __syncwarp();
  out[threadIdx.x] = shared.value[threadIdx.x ^ 1];
}

template <bool kWrong>
__global__ void barrier_in_a_branch(int* out) {
  if (!kWrong || threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = threadIdx.x;
}

template <bool kWrong>
__global__ void early_return(int* out) {
  out[threadIdx.x] = threadIdx.x;
  if (kWrong && threadIdx.x >= 40) return;
  __syncthreads();
  __syncthreads();
}

template <bool kWrong>
__global__ void barriers_at_two_places(int* out) {
  if (kWrong && threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = threadIdx.x;
}

// --- warp collectives ------------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void shuffle_in_a_branch(int* out) {
  int got = 0;
  if (!kWrong || threadIdx.x % 32 < 20) got = __shfl_xor_sync(~0u, static_cast<int>(threadIdx.x), 1);
  out[threadIdx.x] = got;
}

template <bool kWrong>
__global__ void shuffle_from_outside_the_mask(int* out) {
  int got = 0;
  if (threadIdx.x % 32 < 8) got = __shfl_xor_sync(0xFFu, static_cast<int>(threadIdx.x), kWrong ? 8 : 4);
  out[threadIdx.x] = got;
}

template <bool kWrong>
__global__ void lane_not_in_its_mask(int* out) {
  out[threadIdx.x] = __shfl_sync(kWrong ? 0xFFFFu : ~0u, static_cast<int>(threadIdx.x), 3);
}

// --- shared memory ---------------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void shared_memory_nobody_wrote(int* out) {
  auto& shared = gpu::shared_memory<Numbers>();
  if (!kWrong || threadIdx.x != 17) shared.value[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = shared.value[threadIdx.x];
}

template <bool kWrong>
__global__ void past_shared_memory(int* out) {
  auto& shared = gpu::shared_memory<Numbers>();
  int* at = shared.value + threadIdx.x + (kWrong ? 1 : 0);
  *at = threadIdx.x;
  out[threadIdx.x] = *at;
}

struct MoreNumbers {
  int value[kThreads + 1];
};

template <bool kWrong>
__global__ void more_shared_memory_than_asked(int* out) {
  auto& shared = gpu::shared_memory<std::conditional_t<kWrong, MoreNumbers, Numbers>>();
  shared.value[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared.value[threadIdx.x];
}

template <bool kWrong>
__global__ void copy_used_before_its_wait(int* out, const uint64_t* in) {
  auto& shared = gpu::shared_memory<Words>();
  gpu::copy_async(&shared.value[2 * threadIdx.x], in + 2 * threadIdx.x, true);
  gpu::copy_async_commit();
  if constexpr (!kWrong) gpu::copy_async_wait<0>();
  out[threadIdx.x] = static_cast<int>(shared.value[2 * threadIdx.x]);
}

template <bool kWrong>
__global__ void copy_never_committed(int* out, const uint64_t* in) {
  auto& shared = gpu::shared_memory<Words>();
  gpu::copy_async(&shared.value[2 * threadIdx.x], in + 2 * threadIdx.x, true);
  if constexpr (!kWrong) gpu::copy_async_commit();
  gpu::copy_async_wait<0>();
  out[threadIdx.x] = static_cast<int>(shared.value[2 * threadIdx.x]);
}

template <bool kWrong>
__global__ void copy_into_what_is_still_read(int* out, const uint64_t* in) {
  auto& shared = gpu::shared_memory<Words>();
  shared.value[2 * threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = static_cast<int>(shared.value[2 * (kThreads - 1 - threadIdx.x)]);
  if constexpr (!kWrong) __syncthreads();
  gpu::copy_async(&shared.value[2 * threadIdx.x], in + 2 * threadIdx.x, true);
  gpu::copy_async_commit();
  gpu::copy_async_wait<0>();
}

// --- global memory ---------------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void read_past_the_end(int* out, const uint64_t* in) {
  out[threadIdx.x] = static_cast<int>(in[2 * threadIdx.x + (kWrong ? 2 : 0)]);
}

template <bool kWrong>
__global__ void read_before_the_begin(int* out, const uint64_t* in) {
  const int at = static_cast<int>(threadIdx.x) - (kWrong ? 1 : 0);
  out[threadIdx.x] = static_cast<int>(in[2 * at]);
}

template <bool kWrong>
__global__ void write_past_the_end(int* out) {
  out[threadIdx.x + (kWrong ? 1 : 0)] = threadIdx.x;
}

template <bool kWrong>
__global__ void write_to_an_input(int* out, const uint64_t* in) {
  out[threadIdx.x] = static_cast<int>(in[2 * threadIdx.x]);
  if (kWrong) const_cast<uint64_t*>(in)[2 * threadIdx.x] = 0;
}

template <bool kWrong>
__global__ void misaligned(int* out, const uint64_t* in) {
  out[threadIdx.x] = static_cast<int>(gpu::load<2>(in + (kWrong ? 1 : 0) + (threadIdx.x ? 2 * threadIdx.x - 2 : 0))[0]);
}

template <bool kWrong>
__global__ void blocks_write_the_same(int* out) {
  if (blockIdx.x == 0 || kWrong) out[threadIdx.x] = threadIdx.x;
}

template <bool kWrong>
__global__ void block_reads_anothers_result(int* out) {
  if (blockIdx.x == 0) out[threadIdx.x] = threadIdx.x;
  if (blockIdx.x == 1 && kWrong && out[threadIdx.x] == 12345) out[threadIdx.x] = 0;
}

// --- kernels before --------------------------------------------------------------------------------------------------

template <bool kWrong>
__global__ void read_before_waiting_for_kernels(int* out, const uint64_t* in) {
  int number = 0;
  if constexpr (kWrong) number = static_cast<int>(in[2 * threadIdx.x]);
  gpu::await_kernels_before();
  if constexpr (!kWrong) number = static_cast<int>(in[2 * threadIdx.x]);
  out[threadIdx.x] = number;
}

template <bool kWrong>
__global__ void thread_that_does_not_wait_for_kernels(int* out, const uint64_t* in) {
  if (!kWrong || threadIdx.x != 40) gpu::await_kernels_before();
  out[threadIdx.x] = static_cast<int>(in[2 * threadIdx.x]);
}

// --- running them ----------------------------------------------------------------------------------------------------

template <class... Inputs>
std::string run(void (*kernel)(int*, Inputs...), int (*want)(int), Flush flush = Flush::end, bool early = false) {
  Buffer<int> out("out", kThreads);
  Buffer<uint64_t> in("in", 2 * kThreads, flush, 16);
  for (size_t i = 0; i < in.size(); ++i) in[i] = i / 2;
  in.read_only();
  const gpu::Launch shape{"planted", 1, kThreads, sizeof...(Inputs) ? sizeof(Words) : sizeof(Numbers),
                          nullptr, early};
  if constexpr (sizeof...(Inputs)) {
    gpu::launch(kernel, shape, out.data(), in.data());
  } else {
    gpu::launch(kernel, shape, out.data());
  }
  for (int t = 0; t < kThreads && want; ++t) {
    const std::string found = "out[" + std::to_string(t) + "] is " + std::to_string(out[t]);
    test::require(out[t] == want(t), found + ", not " + std::to_string(want(t)));
  }
  return test::bytes(out);
}

std::string run_two_blocks(void (*kernel)(int*)) {
  Buffer<int> out("out", kThreads);
  gpu::launch(kernel, {"planted", 2, kThreads}, out.data());
  return test::bytes(out);
}

int same(int t) { return t; }

struct Bug {
  std::function<std::string()> right, wrong;
};

#define BOTH(kernel, ...) \
  {#kernel, {[] { return run(kernel<false>, __VA_ARGS__); }, [] { return run(kernel<true>, __VA_ARGS__); }}}
#define BOTH_OF_TWO_BLOCKS(kernel) \
  {#kernel, {[] { return run_two_blocks(kernel<false>); }, [] { return run_two_blocks(kernel<true>); }}}

const std::map<std::string, Bug> kBugs = {
    BOTH(missing_barrier, [](int t) { return kThreads - 1 - t; }),
    BOTH(missing_barrier_before_reuse, [](int t) { return 3 * ((t + 32) % kThreads) + 3; }),
    BOTH(missing_syncwarp, [](int t) { return t ^ 1; }),
    BOTH(barrier_in_a_branch, same),
    BOTH(early_return, same),
    BOTH(barriers_at_two_places, same),
    BOTH(shuffle_in_a_branch, [](int t) { return t ^ 1; }),
    BOTH(shuffle_from_outside_the_mask, [](int t) { return t % 32 < 8 ? t ^ 4 : 0; }),
    BOTH(lane_not_in_its_mask, [](int t) { return t / 32 * 32 + 3; }),
    BOTH(shared_memory_nobody_wrote, same),
    BOTH(past_shared_memory, same),
    BOTH(more_shared_memory_than_asked, same),
    BOTH(copy_used_before_its_wait, same),
    BOTH(copy_never_committed, same),
    BOTH(copy_into_what_is_still_read, [](int t) { return kThreads - 1 - t; }),
    BOTH(read_past_the_end, nullptr),
    BOTH(read_before_the_begin, nullptr, Flush::begin),
    BOTH(write_past_the_end, nullptr),
    BOTH(write_to_an_input, same),
    BOTH(misaligned, nullptr),
    BOTH(read_before_waiting_for_kernels, same, Flush::end, true),
    BOTH(thread_that_does_not_wait_for_kernels, same, Flush::end, true),
    BOTH_OF_TWO_BLOCKS(blocks_write_the_same),
    BOTH_OF_TWO_BLOCKS(block_reads_anothers_result),
};

int main(int argc, char** argv) {
  if (argc == 1) {
    for (const auto& bug : kBugs) std::printf("%s\n", bug.first.c_str());
    return 0;
  }
  const auto bug = kBugs.find(argv[1]);
  if (argc != 3 || bug == kBugs.end()) return 2;
  const bool wrong = std::strcmp(argv[2], "wrong") == 0;
  return test::run(argv[1], wrong ? bug->second.wrong : bug->second.right) ? 0 : 1;
}
