#include "cpu/gemm/col2im.h"

#include "cpu/elementwise/pass_rows.h"
#include "cpu/gemm/col2im_gemm.h"

namespace fastdcgan::cpu {

bool scatters(const Contraction& c) {
  const int64_t by_gathering = Panels(c.out_channels).width * c.taps();  // columns for each input pixel
  return c.y.transposed && 2 * Panels(c.taps() * c.out_channels).width <= by_gathering;
}

void scatter(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out, const Finish& finish) {
  with_type(dtype, [&](auto zero) { scatter_with<decltype(zero), FloatProducts>(c, in, weight, out, finish); });
}

}  // namespace fastdcgan::cpu
