// torch.ops.fastdcgan_cpu, what training needs beside the blocks: checks, allocation, registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "cpu/memory/memory.h"
#include "cpu/train/adam.h"
#include "cpu/train/images.h"
#include "cpu/train/losses.h"

namespace fastdcgan::cpu {
namespace {

using at::Tensor;
using std::optional;

bool is_float(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf; }

// A dense tensor as long as the weight, in the same order (the caller has seen to that).
void check_like(const Tensor& t, const Tensor& weight, const char* what) {
  TORCH_CHECK_VALUE(
      t.sizes() == weight.sizes() && t.is_non_overlapping_and_dense(), "expected ", what, " dense and of shape ",
      weight.sizes(), ", got ", t.sizes(), " with strides ", t.strides());
}

void check_float32(const Tensor& t, const char* what) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, "expected float32 as ", what, ", got ", t.scalar_type());
}

// Where `found_inf` is not 0 nothing is done, and no step counted. A copy with no elements is none; with `masters`, the
// copies are the parameters, and what somebody has set in them since the last step takes hold.
void adam_(
    at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
    at::TensorList copies, at::TensorList steps, double lr, const optional<Tensor>& lr_tensor,
    double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool maximize, bool masters,
    const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf) {
  for (const at::TensorList& list : {grads, exp_avgs, exp_avg_sqs, copies, steps})
    TORCH_CHECK_VALUE(
        list.size() == weights.size(), "expected lists of ", weights.size(), ", got one of ", list.size());
  if (found_inf.has_value() && found_inf->item<double>() != 0) return;
  std::vector<AdamTensor> tensors;
  tensors.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &weight = weights[i], &grad = grads[i], &copy = copies[i], &step = steps[i];
    check_float32(weight, "weight"), check_float32(step, "step");
    check_float32(exp_avgs[i], "exp_avg"), check_float32(exp_avg_sqs[i], "exp_avg_sq");
    check_like(weight, weight, "a weight"), check_like(grad, weight, "a gradient");
    check_like(exp_avgs[i], weight, "exp_avg"), check_like(exp_avg_sqs[i], weight, "exp_avg_sq");
    TORCH_CHECK_TYPE(is_float(grad.scalar_type()), "expected a floating-point gradient, got ", grad.scalar_type());
    TORCH_CHECK_VALUE(step.numel() == 1, "expected one number as step, got ", step.sizes());
    const bool copied = copy.numel() > 0;
    if (copied) check_like(copy, weight, "a copy");
    TORCH_CHECK_TYPE(
        !copied || copy.scalar_type() == at::kBFloat16 || copy.scalar_type() == at::kHalf,
        "expected a copy of bfloat16 or float16, got ", copy.scalar_type());
    tensors.push_back(
        {weight.data_ptr<float>(), grad.data_ptr(), exp_avgs[i].data_ptr<float>(), exp_avg_sqs[i].data_ptr<float>(),
         copied ? copy.data_ptr() : nullptr, weight.numel(), grad.scalar_type(), copy.scalar_type(),
         static_cast<int64_t>(step.const_data_ptr<float>()[0]) + 1});
  }
  const double scale = grad_scale.has_value() ? grad_scale->item<double>() : 1;
  const double rate = lr_tensor.has_value() ? lr_tensor->item<double>() : lr;
  adam_pass(tensors, {rate, beta1, beta2, eps, weight_decay, decoupled, maximize, masters, scale});
  for (const Tensor& step : steps) step.data_ptr<float>()[0] += 1;
}

Tensor images(const Tensor& pixels_, const optional<Tensor>& flip_, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(pixels_.dim() == 4, "expected images [N, H, W, C], got ", pixels_.dim(), " dimensions");
  TORCH_CHECK_TYPE(pixels_.scalar_type() == at::kByte, "expected uint8 images, got ", pixels_.scalar_type());
  TORCH_CHECK_TYPE(is_float(dtype), "expected float32, bfloat16 or float16 as the result, got ", dtype);
  const Tensor pixels = pixels_.contiguous(), flip = flip_.has_value() ? flip_->contiguous() : Tensor();
  TORCH_CHECK_VALUE(
      !flip.defined() || (flip.scalar_type() == at::kBool && flip.dim() == 1 && flip.size(0) == pixels.size(0)),
      "expected a mask of ", pixels.size(0), " booleans, got ", flip.sizes(), " of ", flip.dtype());
  const ImageShape s{pixels.size(0), pixels.size(1), pixels.size(2), pixels.size(3)};
  const Tensor out =
      new_tensor({s.images, s.channels, s.height, s.width}, dtype, at::MemoryFormat::ChannelsLast);
  images_pass(
      s, pixels.const_data_ptr<uint8_t>(), flip.defined() ? flip.const_data_ptr<bool>() : nullptr, out.data_ptr(),
      dtype);
  return out;
}

// losses [parts], probabilities [parts], and the gradient of the losses' sum, or nothing; all in float32.
std::tuple<Tensor, Tensor, Tensor> bce_with_logits(const Tensor& logits_, at::ArrayRef<double> labels, bool with_grad) {
  const auto dtype = logits_.scalar_type();
  TORCH_CHECK_TYPE(is_float(dtype), "expected float32, bfloat16 or float16 logits, got ", dtype);
  const int64_t parts = static_cast<int64_t>(labels.size());
  TORCH_CHECK_VALUE(
      parts > 0 && logits_.numel() > 0 && logits_.numel() % parts == 0, "expected logits in ", parts,
      " equal parts, got ", logits_.sizes());
  const Tensor logits = logits_.contiguous();
  const auto options = logits.options().dtype(at::kFloat);
  const Tensor losses = at::empty({parts}, options), probabilities = at::empty({parts}, options);
  const Tensor grad = with_grad ? at::empty(logits.sizes(), options) : at::empty({0}, options);
  const std::vector<float> y(labels.begin(), labels.end());
  bce_pass(
      logits.const_data_ptr(), dtype, parts, logits.numel() / parts, y.data(), losses.data_ptr<float>(),
      probabilities.data_ptr<float>(), with_grad ? grad.data_ptr<float>() : nullptr);
  return {losses, probabilities, grad};
}

}  // namespace
}  // namespace fastdcgan::cpu

TORCH_LIBRARY_FRAGMENT(fastdcgan_cpu, m) {
  m.def(
      "adam_(Tensor(a!)[] weights, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
      "Tensor(e!)[] copies, Tensor(f!)[] steps, float lr, Tensor? lr_tensor, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled, bool maximize, bool masters, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def("images(Tensor pixels, Tensor? flip, ScalarType dtype) -> Tensor");
  m.def("bce_with_logits(Tensor logits, float[] labels, bool with_grad) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fastdcgan_cpu, CPU, m) {
  m.impl("adam_", fastdcgan::cpu::adam_);
  m.impl("images", fastdcgan::cpu::images);
  m.impl("bce_with_logits", fastdcgan::cpu::bce_with_logits);
}
