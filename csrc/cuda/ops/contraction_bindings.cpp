// torch.ops.fastdcgan_cuda, the contractions: schemas and registration.
#include "cuda/ops/contraction_ops.h"
#include "cuda/ops/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(FASTDCGAN_NAMESPACE, m) {
  m.def(
      "contract(Tensor x, Tensor? y, Tensor? coef, int act, float slope, Tensor weight, bool transposed, int[] stride, "
      "int[] padding, int[] dilation, int[] output_size, int e_kind, Tensor? e_y, Tensor? e_coef, int e_act, "
      "float e_slope, int groups, int stat_groups, int fold, int tile, int splits, bool exact) -> (Tensor, Tensor)");
  m.def(
      "contract_weight_grad(Tensor x, Tensor? x_y, Tensor? x_coef, int x_act, float x_slope, Tensor linear, "
      "Tensor? linear_y, Tensor? linear_coef, int linear_act, float linear_slope, int[] kernel, int[] stride, "
      "int[] padding, int[] dilation, int groups, int tile, int splits, bool exact) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(FASTDCGAN_NAMESPACE, FASTDCGAN_DISPATCH_KEY, m) {
  using namespace fastdcgan::cuda;
  m.impl("contract", TORCH_BOX(&contract_op));
  m.impl("contract_weight_grad", TORCH_BOX(&contract_weight_grad_op));
}
