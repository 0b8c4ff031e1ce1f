// The operator on bce.cuh.
#include "cuda/train/bce.cuh"

#include "cuda/ops/tensors.h"
#include "cuda/ops/training_ops.h"

namespace fastdcgan::cuda {

std::tuple<Tensor, Tensor, Tensor> bce_with_logits_op(const Tensor& logits_, std::vector<double> labels,
                                                      bool with_grad) {
  STD_TORCH_CHECK(is_floating(logits_), "expected float32, bfloat16 or float16 logits");
  const auto parts = static_cast<int64_t>(labels.size());
  STD_TORCH_CHECK(parts > 0 && logits_.numel() > 0 && logits_.numel() % parts == 0, "expected logits in ", parts,
                  " equal parts, got ", shape_text(logits_));
  const OnDevice on(logits_);
  const Tensor logits = logits_.is_contiguous() ? logits_ : torch::stable::contiguous(logits_);
  const Tensor losses = torch::stable::new_empty(logits, {parts}, ScalarType::Float);
  const Tensor probabilities = torch::stable::new_empty(logits, {parts}, ScalarType::Float);
  const Tensor grad = torch::stable::new_empty(logits, {with_grad ? logits.numel() : 0}, ScalarType::Float);
  with_dtype(logits, [&](auto type) {
    using T = decltype(type);
    bce_pass(data<T>(logits), labels.data(), parts, logits.numel() / parts, mutable_data<float>(losses),
             mutable_data<float>(probabilities), with_grad ? mutable_data<float>(grad) : nullptr, on.stream);
  });
  return {losses, probabilities, grad};
}

}  // namespace fastdcgan::cuda
