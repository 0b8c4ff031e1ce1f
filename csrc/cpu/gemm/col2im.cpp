#include "cpu/gemm/col2im.h"

#include "cpu/elementwise/pass_rows.h"
#include "cpu/gemm/col2im_gemm.h"

namespace fastdcgan::cpu {

bool can_col2im(const Contraction& c) {
  const int64_t by_gathering = Panels(c.out_channels).width * c.taps();  // columns for each input pixel
  return c.y.transposed && 2 * Panels(c.taps() * c.out_channels).width <= by_gathering;
}

void col2im_contract(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out,
    const Epilogue& epilogue) {
  with_type(dtype, [&](auto zero) { col2im_with<decltype(zero), FloatProducts>(c, in, weight, out, epilogue); });
}

}  // namespace fastdcgan::cpu
