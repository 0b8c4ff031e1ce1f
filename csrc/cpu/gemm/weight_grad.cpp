#include "cpu/gemm/weight_grad.h"

#include "cpu/elementwise/pass_rows.h"
#include "cpu/gemm/implicit_gemm.h"

namespace fastdcgan::cpu {

void gemm_weight_grad(const Contraction& c, c10::ScalarType dtype, const void* gathered, const void* linear, void* out) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    WeightGrad<T, FloatPixels<T>>(
        c, static_cast<const T*>(gathered), static_cast<const T*>(linear), static_cast<T*>(out)).run();
  });
}

}  // namespace fastdcgan::cpu
