#include "cpu/machine/rates.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

#include "cpu/gemm/gemm.h"
#include "cpu/memory/pages.h"

#ifdef CPU_CAPABILITY_AVX512
#include "cpu/bf16/dot_products.h"
#endif

namespace fastdcgan::cpu {
namespace {

// Sums that do not wait for each other: more than any processor has on their way at once, and no more than registers.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr int kSums = 12;
#else
constexpr int kSums = 6;
#endif
constexpr int kRuns = 10, kCopies = 4;
constexpr int64_t kSteps = 1 << 14;            // of a run
constexpr int64_t kFloats = int64_t{1} << 20;  // that are copied

template <class Run>
double best_nanoseconds(int runs, const Run& run) {
  using Clock = std::chrono::steady_clock;
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < runs; ++i) {
    const auto begin = Clock::now();
    run();
    best = std::min(best, std::chrono::duration<double, std::nano>(Clock::now() - begin).count());
  }
  return best;
}

// `step`: from a sum to the next one.
template <class Product, class Step>
double gigaflops(const Step& step) {
  Floats kept[kSums];
  for (int i = 0; i < kSums; ++i) kept[i] = Floats{} + static_cast<float>(i);
  const double nanoseconds = best_nanoseconds(kRuns, [&] {
    Floats sum[kSums];
    std::copy_n(kept, kSums, sum);
    for (int64_t k = 0; k < kSteps; ++k)
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sum[i] = step(sum[i]);
    std::copy_n(sum, kSums, kept);
  });
  volatile float sink = 0.f;  // what is computed has to be used
  for (const Floats& sum : kept) sink = sink + sum[0];
  return 2. * Product::kElements * kWidth * kSums * kSteps / nanoseconds;
}

double copied_gigabytes() {
  constexpr int64_t kBytes = kFloats * int64_t{sizeof(float)};
  const Pages from = allocate_pages(kBytes), to = allocate_pages(kBytes);
  auto *a = static_cast<float*>(from.get()), *b = static_cast<float*>(to.get());
  std::fill_n(a, kFloats, 1.f);
  std::fill_n(b, kFloats, 1.f);
  const double nanoseconds = best_nanoseconds(kCopies, [&] {
    for (int64_t i = 0; i < kFloats; i += kStep) write_non_temporal(b + i, read(a + i));
    end_non_temporal();
  });
  return 2. * kBytes / nanoseconds;
}

}  // namespace

Rates rates() {
  Rates found{};
  const Floats one = Floats{} + 1.f;
  found.fma = gigaflops<FloatProduct>([&](Floats sum) { return FloatProduct::add(one, .5f, sum); });
#ifdef CPU_CAPABILITY_AVX512
  if (avx512_bf16::usable())
    found.vdpbf16ps = gigaflops<DotProduct>([&](Floats sum) { return DotProduct::add(sum, 1.f, one); });
#endif
  found.copy = copied_gigabytes();
  return found;
}

}  // namespace fastdcgan::cpu
