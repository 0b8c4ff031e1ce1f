#include "cpu/gemm/weight_grad.h"

#include "cpu/amx/amx_contractions.h"
#include "cpu/elementwise/pass_rows.h"
#include "cpu/image/image_side.h"

namespace fastdcgan::cpu {

void weight_grad(const Contraction& c, c10::ScalarType dtype, const void* gathered, const void* linear, void* out) {
  if (on_tiles(dtype)) return weight_grad_on_tiles(c, gathered, linear, out);
  if (is_narrow(c)) return narrow_weight_grad(c, dtype, gathered, linear, out);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    WeightGrad<T, FloatPixels<T>>(
        c, static_cast<const T*>(gathered), static_cast<const T*>(linear), static_cast<T*>(out)).run();
  });
}

}  // namespace fastdcgan::cpu
