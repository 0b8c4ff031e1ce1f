#include "cpu/train/losses.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>

namespace fastdcgan::cpu {
namespace {

// Logits are few (one an image): plain code on one thread.
template <class T>
void bce(
    const T* logits, int64_t parts, int64_t size, const float* labels, float* losses, float* probabilities,
    float* grad) {
  for (int64_t part = 0; part < parts; ++part) {
    const float y = labels[part], other = 1.f - y;
    double loss = 0, probability = 0;
    for (int64_t i = part * size; i < (part + 1) * size; ++i) {
      const float x = static_cast<float>(logits[i]), e = std::exp(-std::abs(x));
      const float p = (x < 0 ? e : 1.f) / (1.f + e);
      loss += other * x + (x < 0 ? -x : 0.f) + std::log1p(e);
      probability += p;
      // p - y, without its cancellation.
      if (grad != nullptr) grad[i] = (x < 0 ? other * e - y : other - y * e) / (1.f + e) / static_cast<float>(size);
    }
    losses[part] = static_cast<float>(loss / static_cast<double>(size));
    probabilities[part] = static_cast<float>(probability / static_cast<double>(size));
  }
}

}  // namespace

void bce_pass(
    const void* logits, c10::ScalarType dtype, int64_t parts, int64_t size, const float* labels, float* losses,
    float* probabilities, float* grad) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    bce(static_cast<const T*>(logits), parts, size, labels, losses, probabilities, grad);
  };
  switch (dtype) {
    case c10::ScalarType::Float: return run(0.f);
    case c10::ScalarType::BFloat16: return run(c10::BFloat16{});
    case c10::ScalarType::Half: return run(c10::Half{});
    default: TORCH_INTERNAL_ASSERT(false, "dtype ", dtype);
  }
}

}  // namespace fastdcgan::cpu
