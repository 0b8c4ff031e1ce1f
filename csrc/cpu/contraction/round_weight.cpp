#include "cpu/contraction/round_weight.h"

#include <ATen/Parallel.h>

#include "cpu/elementwise/pass_rows.h"
#include "cpu/elementwise/widen.h"

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of a thread's share, at the least

}  // namespace

Rounded::Rounded(const Weight& weight, c10::ScalarType dtype) : weight_(weight) {
  if (!weight.wide) return;
  static thread_local Scratch scratch;
  const int64_t count = weight.bytes / int64_t{sizeof(float)};
  const auto* from = static_cast<const float*>(weight.data);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = scratch.get<T>(count);
    at::parallel_for(
        0, count, kGrain, [&](int64_t begin, int64_t end) { narrow(to + begin, from + begin, end - begin); });
    weight_.data = to;
    weight_.bytes = count * int64_t{sizeof(T)};
  });
  weight_.storage = nullptr;
  weight_.wide = false;
}

}  // namespace fastdcgan::cpu
