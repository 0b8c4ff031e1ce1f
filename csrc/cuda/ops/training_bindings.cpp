// torch.ops.fastdcgan_cuda, what training needs beside the blocks: schemas and registration.
#include "cuda/ops/library.h"
#include "cuda/ops/training_ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(FASTDCGAN_NAMESPACE, m) {
  m.def(
      "adam_(Tensor(a!)[] weights, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
      "Tensor(e!)[] copies, Tensor(f!)[] steps, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled, bool maximize, bool masters, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def("images(Tensor pixels, Tensor? flip, ScalarType dtype) -> Tensor");
  m.def("bce_with_logits(Tensor logits, float[] labels, bool with_grad) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(FASTDCGAN_NAMESPACE, FASTDCGAN_DISPATCH_KEY, m) {
  using namespace fastdcgan::cuda;
  m.impl("adam_", TORCH_BOX(&adam_op));
  m.impl("images", TORCH_BOX(&images_op));
  m.impl("bce_with_logits", TORCH_BOX(&bce_with_logits_op));
}
