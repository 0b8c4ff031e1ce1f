// torch.ops.fastdcgan_cuda: schemas and registration.
#include "cuda/ops/elementwise_ops.h"
#include "cuda/ops/library.h"

STABLE_TORCH_LIBRARY(FASTDCGAN_NAMESPACE, m) {
  m.def("norm_act(Tensor y, Tensor coef, int act, float slope) -> Tensor");
  m.def("norm_act_backward(Tensor da, Tensor y, Tensor grad_coef, int act, float slope) -> Tensor");
  m.def("norm_act_reduce(Tensor da, Tensor y, Tensor coef, int act, float slope) -> Tensor");
  m.def("grad_stats(Tensor da, Tensor y, Tensor coef, int act, float slope) -> (Tensor, Tensor)");
  m.def("batch_stats(Tensor y, int groups) -> Tensor");
  m.def(
      "coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? shift, float eps) -> Tensor");
  m.def("grad_coefficients(Tensor sums, Tensor coef, float count) -> Tensor");
  m.def(
      "update_running_(Tensor(a!) mean, Tensor(b!) var, Tensor stats, Tensor? shift, Tensor? factor, float momentum) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FASTDCGAN_NAMESPACE, FASTDCGAN_DISPATCH_KEY, m) {
  using namespace fastdcgan::cuda;
  m.impl("norm_act", TORCH_BOX(&norm_act_op));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward_op));
  m.impl("norm_act_reduce", TORCH_BOX(&norm_act_reduce_op));
  m.impl("grad_stats", TORCH_BOX(&grad_stats_op));
  m.impl("batch_stats", TORCH_BOX(&batch_stats_op));
  m.impl("coefficients", TORCH_BOX(&coefficients_op));
  m.impl("grad_coefficients", TORCH_BOX(&grad_coefficients_op));
  m.impl("update_running_", TORCH_BOX(&update_running_op));
}
