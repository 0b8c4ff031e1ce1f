// torch.ops.fastdcgan_cuda, the image-side layers: schemas and registration.
#include "cuda/ops/image_side_ops.h"
#include "cuda/ops/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(FASTDCGAN_NAMESPACE, m) {
  m.def(
      "image_side_conv(Tensor x, Tensor? y, Tensor? coef, int act, float slope, Tensor weight, int[] stride, int[] "
      "padding, "
      "int e_kind, Tensor? e_coef, int e_act, float e_slope) -> Tensor");
  m.def(
      "image_side_conv_transpose(Tensor x, Tensor? y, Tensor? coef, int act, float slope, Tensor weight, int[] stride, "
      "int[] padding, int[] output_size, int e_kind, Tensor? e_coef, int e_act, float e_slope, bool channels_last) -> "
      "Tensor");
  m.def(
      "image_side_weight_grad(Tensor x, Tensor? x_y, Tensor? x_coef, int x_act, float x_slope, Tensor linear, "
      "Tensor? linear_y, Tensor? linear_coef, int linear_act, float linear_slope, int[] kernel, int[] stride, "
      "int[] padding, bool channels_last) -> Tensor");
  m.def("image_side_limits() -> int[]");
  m.def("image_side_transpose_bytes(int channels, int wide, int[] kernel, int[] stride, int[] padding) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(FASTDCGAN_NAMESPACE, FASTDCGAN_DISPATCH_KEY, m) {
  using namespace fastdcgan::cuda;
  m.impl("image_side_conv", TORCH_BOX(&image_side_conv_op));
  m.impl("image_side_conv_transpose", TORCH_BOX(&image_side_conv_transpose_op));
  m.impl("image_side_weight_grad", TORCH_BOX(&image_side_weight_grad_op));
}

STABLE_TORCH_LIBRARY_IMPL(FASTDCGAN_NAMESPACE, CompositeExplicitAutograd, m) {
  using namespace fastdcgan::cuda;
  m.impl("image_side_limits", TORCH_BOX(&image_side_limits_op));
  m.impl("image_side_transpose_bytes", TORCH_BOX(&image_side_transpose_bytes_op));
}
