#include "cpu/bf16/dot_contractions.h"

#ifdef FASTDCGAN_AVX512_BF16

#include "cpu/bf16/dot_products.h"
#include "cpu/bf16/pair_contractions.h"

namespace fastdcgan::cpu {

void dot_contract(
    const Contraction& c, c10::ScalarType, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
  contract_pairs<DotProducts>(c, in, weight, out, epilogue);
}

void dot_col2im(
    const Contraction& c, c10::ScalarType, const void* in, const Weight& weight, void* out, const Epilogue& epilogue) {
  col2im_with<DotProducts::Element, DotProducts>(c, in, weight, out, epilogue);
}

void dot_weight_grad(const Contraction& c, c10::ScalarType, const void* gathered, const void* linear, void* out) {
  grad_of_pairs<DotProducts>(c, gathered, linear, out);
}

}  // namespace fastdcgan::cpu

#endif
