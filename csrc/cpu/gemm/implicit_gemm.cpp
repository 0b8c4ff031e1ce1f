#include "cpu/gemm/implicit_gemm.h"

#include "cpu/contraction/pack.h"
#include "cpu/contraction/packed_weights.h"
#include "cpu/contraction/round_weight.h"
#include "cpu/elementwise/pass_rows.h"

namespace fastdcgan::cpu {

void gemm_contract(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out,
    const Epilogue& epilogue) {
  static thread_local Scratch scratch;
  const int64_t size = packed_size<FloatProducts>(c);
  const auto pack = [&](void* to) { pack_weight(c, dtype, Rounded(weight, dtype).get(), static_cast<float*>(to)); };
  const auto cached = packed_weight(c, dtype, weight, FloatProducts::kDepthUnit, size * int64_t{sizeof(float)}, pack);
  float* packed = cached ? static_cast<float*>(cached->data()) : scratch.floats(size);
  if (!cached) pack(packed);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    ImplicitGemm<T, FloatProducts>(c, static_cast<const T*>(in), packed, static_cast<T*>(out), epilogue).run();
  });
}

}  // namespace fastdcgan::cpu
