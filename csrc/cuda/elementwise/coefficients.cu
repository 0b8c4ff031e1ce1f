// Operators on coefficients.cuh.
#include "cuda/elementwise/coefficients.cuh"

#include "cuda/ops/tensors.h"

namespace fastdcgan::cuda {

Tensor coefficients_op(
    const Tensor& mean_, const Tensor& var_, const optional<Tensor>& weight_, const optional<Tensor>& bias_,
    const optional<Tensor>& shift_, double eps) {
  STD_TORCH_CHECK(
      mean_.dim() == 2 && var_.dim() == 2 && mean_.size(0) == var_.size(0) && mean_.size(1) == var_.size(1),
      "expected mean and variance [groups, channels], got ", shape_text(mean_), " and ", shape_text(var_));
  const OnDevice on(mean_);
  const Tensor mean = as_float(mean_), var = as_float(var_);
  const int64_t groups = mean.size(0), channels = mean.size(1);
  const auto weight = as_float(weight_, channels), bias = as_float(bias_, channels), shift = as_float(shift_, channels);
  const Tensor coef = new_vectors(mean, 4, groups, channels);
  if (groups * channels == 0) return coef;
  gpu::launch_early(coefficients<>, {"coefficients", vector_grid(groups * channels), kVectorThreads, 0, on.stream},
                    data<float>(mean), data<float>(var), data_or_null(weight), data_or_null(bias),
                    data_or_null(shift), eps, groups, channels, mutable_data<float>(coef));
  return coef;
}

Tensor grad_coefficients_op(const Tensor& sums_, const Tensor& coef_, double count) {
  STD_TORCH_CHECK(
      coef_.dim() == 3 && coef_.size(0) == 4 && sums_.dim() == 3 && sums_.size(0) == 2 &&
          sums_.size(1) == coef_.size(1) && sums_.size(2) == coef_.size(2),
      "expected sums [2, groups, channels] and coefficients [4, groups, channels], got ", shape_text(sums_), " and ",
      shape_text(coef_));
  const OnDevice on(coef_);
  const Tensor sums = as_float(sums_), coef = as_float(coef_);
  const Tensor grad_coef = new_vectors(coef, 4, coef.size(1), coef.size(2));
  const int64_t row = coef.size(1) * coef.size(2);
  if (row == 0) return grad_coef;
  gpu::launch_early(grad_coefficients<>, {"grad_coefficients", vector_grid(row), kVectorThreads, 0, on.stream},
                    data<float>(sums), data<float>(coef), count, row, mutable_data<float>(grad_coef));
  return grad_coef;
}

void update_running_op(
    const Tensor& mean, const Tensor& var, const Tensor& stats_, const optional<Tensor>& shift_,
    const optional<Tensor>& factor_, double momentum) {
  STD_TORCH_CHECK(
      stats_.dim() == 3 && stats_.size(0) == 3 && mean.dim() == 1 && var.dim() == 1 && mean.size(0) == stats_.size(2) &&
          var.size(0) == mean.size(0),
      "expected statistics [3, groups, channels] and running ones [channels], got ", shape_text(stats_), ", ",
      shape_text(mean), " and ", shape_text(var));
  STD_TORCH_CHECK(
      mean.scalar_type() == ScalarType::Float && var.scalar_type() == ScalarType::Float && mean.is_contiguous() &&
          var.is_contiguous(),
      "expected contiguous float32 running statistics");
  const OnDevice on(mean);
  const Tensor stats = as_float(stats_);
  const int64_t groups = stats.size(1), channels = stats.size(2);
  const auto shift = as_float(shift_, channels), factor = as_float(factor_, groups);
  if (channels == 0) return;
  gpu::launch_early(update_running<>, {"update_running", vector_grid(channels), kVectorThreads, 0, on.stream},
                    mutable_data<float>(mean), mutable_data<float>(var), data<float>(stats), data_or_null(shift),
                    data_or_null(factor), static_cast<float>(momentum), groups, channels);
}

}  // namespace fastdcgan::cuda
