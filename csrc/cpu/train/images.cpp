#include "cpu/train/images.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>

namespace fastdcgan::cpu {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values that are worth a thread

template <class T>
void normalise(const ImageShape& s, const uint8_t* pixels, const bool* flip, T* out) {
  std::array<T, 256> level;
  for (int i = 0; i < 256; ++i) level[i] = static_cast<T>(static_cast<float>(i) / 127.5f - 1.f);
  const int64_t row = s.width * s.channels, rows = s.images * s.height;
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* from = pixels + r * row;
      T* to = out + r * row;
      if (flip == nullptr || !flip[r / s.height]) {
        for (int64_t i = 0; i < row; ++i) to[i] = level[from[i]];
        continue;
      }
      for (int64_t x = 0; x < s.width; ++x)
        for (int64_t c = 0; c < s.channels; ++c)
          to[x * s.channels + c] = level[from[(s.width - 1 - x) * s.channels + c]];
    }
  });
}

}  // namespace

void images_pass(const ImageShape& s, const uint8_t* pixels, const bool* flip, void* out, c10::ScalarType dtype) {
  switch (dtype) {
    case c10::ScalarType::Float: return normalise(s, pixels, flip, static_cast<float*>(out));
    case c10::ScalarType::BFloat16: return normalise(s, pixels, flip, static_cast<c10::BFloat16*>(out));
    case c10::ScalarType::Half: return normalise(s, pixels, flip, static_cast<c10::Half*>(out));
    default: TORCH_INTERNAL_ASSERT(false, "dtype ", dtype);
  }
}

}  // namespace fastdcgan::cpu
