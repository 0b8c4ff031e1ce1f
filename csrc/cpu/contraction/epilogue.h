// What happens to rows of sums before they are stored: act(scale*sum + shift), by column.
#pragma once

#include <vector>

#include "cpu/contraction/contraction.h"
#include "cpu/gemm/gemm.h"

namespace fastdcgan::cpu {

class RowEpilogue {
 public:
  // For rows of `repeats` times all `channels`.
  RowEpilogue(const Epilogue& epilogue, int64_t channels, int64_t repeats = 1) : act_(epilogue.act) {
    const bool nothing = !epilogue.scale && !epilogue.shift && epilogue.act.id == 0;
    if (nothing) return;
    with_activation<V>(act_.id, act_.slope, [&](auto act) { apply_ = &RowEpilogue::apply<decltype(act)>; });
    width_ = Panels(channels * repeats).width;
    columns_.assign(2 * width_, 0.f);
    for (int64_t r = 0; r < repeats; ++r)
      for (int64_t c = 0; c < channels; ++c) {
        columns_[r * channels + c] = epilogue.scale ? epilogue.scale[c] : 1.f;
        columns_[width_ + r * channels + c] = epilogue.shift ? epilogue.shift[c] : 0.f;
      }
  }
  // In place, columns [first, first + n): n is a multiple of kWidth.
  void run(float* sums, int64_t first, int64_t n) const {
    if (apply_) (this->*apply_)(sums, first, n);
  }

 private:
  template <class Act>
  void apply(float* sums, int64_t first, int64_t n) const {
    const Act act(act_.slope);
    const float *scale = columns_.data() + first, *shift = scale + width_;
    for (int64_t i = 0; i < n; i += kWidth)
      act.forward(at::vec::fmadd(V::loadu(sums + i), V::loadu(scale + i), V::loadu(shift + i))).store(sums + i);
  }

  Activation act_;
  int64_t width_ = 0;
  std::vector<float> columns_;  // [2, width]
  void (RowEpilogue::*apply_)(float*, int64_t, int64_t) const = nullptr;
};

}  // namespace fastdcgan::cpu
