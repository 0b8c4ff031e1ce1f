// The operators of torch.ops.fastdcgan_cuda, which fastdcgan/backends/cuda.py calls. `coef`, `grad_coef`, `stats` and
// `sums` are as in fastdcgan/backends/base.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastdcgan::cuda {

using std::optional;
using torch::stable::Tensor;

// norm_act.cu
Tensor norm_act_op(const Tensor& y, const Tensor& coef, int64_t act, double slope);
Tensor norm_act_backward_op(const Tensor& da, const Tensor& y, const Tensor& grad_coef, int64_t act, double slope);

// statistics.cu
Tensor batch_stats_op(const Tensor& y, int64_t groups);
Tensor norm_act_reduce_op(const Tensor& da, const Tensor& y, const Tensor& coef, int64_t act, double slope);
std::tuple<Tensor, Tensor> grad_stats_op(
    const Tensor& da, const Tensor& y, const Tensor& coef, int64_t act, double slope);

// coefficients.cu
Tensor coefficients_op(
    const Tensor& mean, const Tensor& var, const optional<Tensor>& weight, const optional<Tensor>& bias,
    const optional<Tensor>& shift, double eps);
Tensor grad_coefficients_op(const Tensor& sums, const Tensor& coef, double count);
void update_running_op(
    const Tensor& mean, const Tensor& var, const Tensor& stats, const optional<Tensor>& shift,
    const optional<Tensor>& factor, double momentum);

}  // namespace fastdcgan::cuda
