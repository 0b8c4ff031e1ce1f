// The operator on adam.cuh.
#include "cuda/train/adam.cuh"

#include "cuda/ops/tensors.h"
#include "cuda/ops/training_ops.h"

namespace fastdcgan::cuda {
namespace {

// Without gaps, in any order of dimensions: stepping through the strides from the smallest on fills the memory.
bool is_dense(const Tensor& t) {
  int64_t expected = 1;
  std::vector<bool> done(t.dim(), false);
  for (int64_t left = t.dim(); left > 0; --left) {
    int64_t next = -1;
    for (int64_t i = 0; i < t.dim(); ++i)
      if (!done[i] && (t.size(i) == 1 || t.stride(i) == expected)) next = i;
    if (next < 0) return t.numel() == 0;
    done[next] = true;
    expected *= t.size(next);
  }
  return true;
}

void check_like(const Tensor& t, const Tensor& weight, const char* what) {
  bool same = t.dim() == weight.dim() && t.is_cuda() == weight.is_cuda();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == weight.size(i);
  STD_TORCH_CHECK(same && is_dense(t), "expected ", what, " dense and of shape ", shape_text(weight), ", got ",
                  shape_text(t));
}

void check_float32(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "expected float32 as ", what);
}

Storage storage_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::BFloat16: return Storage::bfloat16;
    case ScalarType::Half: return Storage::float16;
    default: return Storage::none;
  }
}

const float* scalar(const optional<Tensor>& t, const char* what) {
  if (!t.has_value()) return nullptr;
  check_float32(*t, what);
  STD_TORCH_CHECK(t->numel() == 1, "expected one number as ", what, ", got ", shape_text(*t));
  return data<float>(*t);
}

}  // namespace

void adam_op(
    std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> copies, std::vector<Tensor> steps, double lr,
    const optional<Tensor>& lr_tensor, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
    bool maximize, bool masters, const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf) {
  const size_t count = weights.size();
  for (const auto* list : {&grads, &exp_avgs, &exp_avg_sqs, &copies, &steps})
    STD_TORCH_CHECK(list->size() == count, "expected lists of ", count, ", got one of ", list->size());
  if (count == 0) return;
  const OnDevice on(weights[0]);
  std::vector<AdamTensor> tensors(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor &weight = weights[i], &grad = grads[i], &copy = copies[i];
    check_float32(weight, "weight"), check_float32(steps[i], "step");
    check_float32(exp_avgs[i], "exp_avg"), check_float32(exp_avg_sqs[i], "exp_avg_sq");
    check_like(weight, weight, "a weight"), check_like(grad, weight, "a gradient");
    check_like(exp_avgs[i], weight, "exp_avg"), check_like(exp_avg_sqs[i], weight, "exp_avg_sq");
    STD_TORCH_CHECK(storage_of(grad) != Storage::none, "expected a floating-point gradient");
    const int64_t chunks = adam_chunks(weight.numel());
    STD_TORCH_CHECK(steps[i].numel() == chunks && steps[i].is_contiguous(), "expected ", chunks, " step counters, got ",
                    shape_text(steps[i]));
    const bool copied = copy.numel() > 0;
    if (copied) check_like(copy, weight, "a copy");
    const Storage copy_type = copied ? storage_of(copy) : Storage::none;
    STD_TORCH_CHECK(!copied || copy_type == Storage::bfloat16 || copy_type == Storage::float16,
                    "expected a copy of bfloat16 or float16");
    AdamTensor& t = tensors[i];
    t.weight = mutable_data<float>(weight);
    t.grad = grad.mutable_data_ptr();
    t.exp_avg = mutable_data<float>(exp_avgs[i]), t.exp_avg_sq = mutable_data<float>(exp_avg_sqs[i]);
    t.copy = copied ? copy.mutable_data_ptr() : nullptr;
    t.steps = mutable_data<float>(steps[i]);
    t.size = weight.numel();
    t.grads = storage_of(grad), t.copied = copy_type;
    t.vectors = gpu::aligned(t.weight) && gpu::aligned(t.grad) && gpu::aligned(t.exp_avg) &&
                gpu::aligned(t.exp_avg_sq) && gpu::aligned(t.copy);
  }
  const AdamSettings settings{
      lr, beta1, beta2, eps, weight_decay, scalar(lr_tensor, "lr"), scalar(grad_scale, "grad_scale"),
      scalar(found_inf, "found_inf"), decoupled, maximize, masters};
  adam_pass(tensors.data(), static_cast<int64_t>(count), settings, on.stream);
}

}  // namespace fastdcgan::cuda
