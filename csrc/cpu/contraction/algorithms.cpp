#include "cpu/contraction/algorithms.h"

#include "cpu/amx/amx.h"
#include "cpu/amx/amx_contractions.h"
#include "cpu/bf16/avx512_bf16.h"
#include "cpu/bf16/dot_contractions.h"
#include "cpu/gemm/col2im.h"
#include "cpu/gemm/implicit_gemm.h"
#include "cpu/image/image_side.h"
#include "cpu/unpacked/unpacked.h"
#include "cpu/winograd/winograd.h"

namespace fastdcgan::cpu {
namespace {

#ifdef FASTDCGAN_AMX
constexpr bool kAmx = true;

bool amx_can_run(const Contraction&, c10::ScalarType dtype, bool) {
  return dtype == c10::ScalarType::BFloat16 && amx_usable();
}
bool amx_col2im_can_run(const Contraction& c, c10::ScalarType dtype, bool stats) {
  return amx_can_run(c, dtype, stats) && can_col2im(c) && !stats;
}
bool split_bf16_can_run(const Contraction&, c10::ScalarType dtype, bool) {
  return dtype == c10::ScalarType::Float && amx_usable();
}
#else
constexpr bool kAmx = false;
#endif

#ifdef FASTDCGAN_AVX512_BF16
bool dot_can_run(const Contraction&, c10::ScalarType dtype, bool) {
  return dtype == c10::ScalarType::BFloat16 && avx512_bf16::usable();
}
bool dot_col2im_can_run(const Contraction& c, c10::ScalarType dtype, bool stats) {
  return dot_can_run(c, dtype, stats) && can_col2im(c) && !stats;
}
#endif

bool col2im_can_run(const Contraction& c, c10::ScalarType, bool stats) { return can_col2im(c) && !stats; }
bool image_side_can_run(const Contraction& c, c10::ScalarType, bool) { return can_image_side(c); }
bool unpacked_can_run(const Contraction& c, c10::ScalarType, bool) { return can_unpacked(c); }
bool always(const Contraction&, c10::ScalarType) { return true; }
bool gemm_can_run(const Contraction&, c10::ScalarType, bool) { return true; }
template <int kOutputs>
bool winograd_can_run(const Contraction& c, c10::ScalarType, bool) {
  return can_winograd<kOutputs>(c);
}

// Products of split floats that are not finite may be right as floats.
#ifdef FASTDCGAN_AMX
void split_bf16_or_float(
    const Contraction& c, c10::ScalarType dtype, const void* in, const Weight& weight, void* out, const Epilogue& e) {
  if (!split_bf16_contract(c, in, weight, out, e))
    algorithms(c, dtype, e.stats != nullptr, false)[0]->contract(c, dtype, in, weight, out, e);
}
void split_bf16_or_float_weight_grad(
    const Contraction& c, c10::ScalarType dtype, const void* gathered, const void* linear, void* out) {
  if (!split_bf16_weight_grad(c, gathered, linear, out))
    algorithms(c, dtype, false, true)[0]->weight_grad(c, dtype, gathered, linear, out);
}
#endif

const Algorithm kAlgorithms[] = {
#ifdef FASTDCGAN_AMX
    {"amx_col2im", amx_col2im_can_run, amx_col2im, nullptr},
    {"amx", amx_can_run, amx_contract, amx_weight_grad},
#endif
#ifdef FASTDCGAN_AVX512_BF16
    {"avx512_bf16_col2im", dot_col2im_can_run, dot_col2im, nullptr},
    {"avx512_bf16", dot_can_run, dot_contract, dot_weight_grad},
#endif
    {"col2im", col2im_can_run, col2im_contract, nullptr},
    {"image_side", image_side_can_run, image_side_contract, image_side_weight_grad},
    {"gemm", gemm_can_run, gemm_contract, gemm_weight_grad},
    {"unpacked", unpacked_can_run, unpacked_contract, unpacked_weight_grad, always},
    {"winograd_2x2", winograd_can_run<2>, winograd_contract<2>, winograd_weight_grad<2>},
    {"winograd_4x4", winograd_can_run<4>, winograd_contract<4>, winograd_weight_grad<4>, can_contiguous_winograd_grad},
#ifdef FASTDCGAN_AMX
    {"split_bf16", split_bf16_can_run, split_bf16_or_float, split_bf16_or_float_weight_grad},
#endif
};

}  // namespace

bool amx_usable() { return kAmx && amx::usable(); }

std::vector<const Algorithm*> algorithms(const Contraction& c, c10::ScalarType dtype, bool stats, bool weight_grad) {
  std::vector<const Algorithm*> found;
  for (const Algorithm& a : kAlgorithms)
    if ((weight_grad ? a.weight_grad != nullptr : a.contract != nullptr) && a.can_run(c, dtype, stats))
      found.push_back(&a);
  return found;
}

}  // namespace fastdcgan::cpu
