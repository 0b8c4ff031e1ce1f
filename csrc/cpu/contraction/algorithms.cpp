#include "cpu/amx/amx_contractions.h"
#include "cpu/contraction/pack.h"
#include "cpu/contraction/packed_weights.h"
#include "cpu/contraction/round_weight.h"
#include "cpu/elementwise/pass_rows.h"
#include "cpu/gemm/col2im.h"
#include "cpu/gemm/implicit_gemm.h"
#include "cpu/image/image_side.h"

namespace fastdcgan::cpu {

bool contract(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out, const Finish& finish) {
  const Finisher finisher(finish, c.out_channels);
  if (!finisher.known()) return false;
  const bool scattered = !finish.stats && scatters(c);
  if (on_tiles(dtype)) {
    (scattered ? scatter_on_tiles : contract_on_tiles)(c, in, weight, out, finish);
    return true;
  }
  if (scattered) {
    scatter(c, dtype, in, weight, out, finish);
    return true;
  }
  if (is_narrow(c)) {
    narrow_contract(c, dtype, in, weight, out, finish);
    return true;
  }
  static thread_local Scratch scratch;
  const int64_t size = packed_size<FloatProducts>(c);
  const auto pack = [&](void* to) { pack_weight(c, dtype, Rounded(weight, dtype).get(), static_cast<float*>(to)); };
  const auto kept = kept_weight(c, dtype, weight, FloatProducts::kDepthUnit, size * int64_t{sizeof(float)}, pack);
  float* packed = kept ? static_cast<float*>(kept->data()) : scratch.floats(size);
  if (!kept) pack(packed);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    Gather<T, FloatProducts>(c, static_cast<const T*>(in), packed, static_cast<T*>(out), finish, finisher).run();
  });
  return true;
}

}  // namespace fastdcgan::cpu
