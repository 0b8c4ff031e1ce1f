// torch.ops.fastdcgan_cpu: checks, allocation, registration.
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/elementwise/passes.h"
#include "cpu/elementwise/pass_rows.h"
#include "cpu/memory/memory.h"

namespace fastdcgan::cpu {
namespace {

using at::Tensor;
using std::optional;

at::MemoryFormat format_of(const Shape& s) {
  return s.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

Tensor dense(const Tensor& y) {
  TORCH_CHECK_VALUE(y.dim() == 4, "expected a tensor [N, C, H, W], got ", y.dim(), " dimensions");
  TORCH_CHECK_VALUE(y.device().is_cpu(), "expected a tensor on the CPU, got one on ", y.device());
  const auto dtype = y.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      "expected float32, bfloat16 or float16, got ", dtype);
  return y.contiguous(y.suggest_memory_format());
}

Shape shape_of(const Tensor& y, int64_t groups) {
  TORCH_CHECK_VALUE(
      groups > 0 && y.size(0) % groups == 0, "a batch of ", y.size(0), " can't have ", groups, " statistics groups");
  // A tensor that is both (one channel, or one pixel) goes the way of channels_last, which needs no planes.
  return {
      groups, y.size(0) / groups, y.size(1), y.size(2) * y.size(3), y.is_contiguous(at::MemoryFormat::ChannelsLast)};
}

Tensor checked_coef(const Tensor& coef, const Tensor& y) {
  TORCH_CHECK_VALUE(
      coef.dim() == 3 && coef.size(0) >= 2 && coef.size(0) <= 5 && coef.size(2) == y.size(1),
      "expected coefficients [2 to 5, groups, ", y.size(1), "], got ", coef.sizes());
  TORCH_CHECK_TYPE(coef.scalar_type() == at::kFloat, "expected float32 coefficients, got ", coef.scalar_type());
  return coef.contiguous();
}

void check_grad(const Tensor& da, const Tensor& y) {
  TORCH_CHECK_VALUE(da.sizes() == y.sizes(), "expected a gradient of shape ", y.sizes(), ", got ", da.sizes());
  TORCH_CHECK_TYPE(
      da.scalar_type() == y.scalar_type(), "expected a gradient of dtype ", y.scalar_type(), ", got ",
      da.scalar_type());
}

void check_activation(bool known, int64_t id, const Tensor& coef) {
  TORCH_CHECK_VALUE(known, "unknown activation id ", id, " for ", coef.size(0), " rows of coefficients");
}

Activation activation(int64_t id, double slope) { return {static_cast<int>(id), static_cast<float>(slope)}; }

// What is overwritten lies in memory as the raw output does.
void check_place(const Tensor& x, const Tensor& y, const Shape& s) {
  TORCH_CHECK_VALUE(
      x.is_contiguous(format_of(s)) && y.is_contiguous(format_of(s)), "expected tensors in memory format ",
      format_of(s), ", got strides ", x.strides(), " and ", y.strides());
}

// `out` may be `y`.
void norm_act_into(const Tensor& out, const Tensor& y, const Tensor& coef_, int64_t act, double slope) {
  const Tensor coef = checked_coef(coef_, y);
  const Shape s = shape_of(y, coef.size(1));
  check_place(out, y, s);
  check_activation(
      norm_act_pass(s, {y.const_data_ptr(), nullptr, out.data_ptr()}, y.scalar_type(), coef.const_data_ptr<float>(),
                    coef.size(0), activation(act, slope)),
      act, coef);
}

Tensor norm_act(const Tensor& y_, const Tensor& coef, int64_t act, double slope) {
  const Tensor y = dense(y_), out = new_tensor_like(y);
  norm_act_into(out, y, coef, act, slope);
  return out;
}

void norm_act_(const Tensor& y, const Tensor& coef, int64_t act, double slope) {
  norm_act_into(y, dense(y), coef, act, slope);
}

// `out` may be `da`.
void norm_act_backward_into(
    const Tensor& out, const Tensor& da_, const Tensor& y, const Tensor& coef_, int64_t act, double slope) {
  const Tensor coef = checked_coef(coef_, y);
  check_grad(da_, y);
  const Shape s = shape_of(y, coef.size(1));
  check_place(out, y, s);
  const Tensor da = da_.contiguous(format_of(s));
  check_activation(
      norm_act_backward_pass(s, {y.const_data_ptr(), da.const_data_ptr(), out.data_ptr()}, y.scalar_type(),
                             coef.const_data_ptr<float>(), coef.size(0), activation(act, slope)),
      act, coef);
}

Tensor norm_act_backward(const Tensor& da, const Tensor& y_, const Tensor& coef, int64_t act, double slope) {
  const Tensor y = dense(y_), out = new_tensor_like(y);
  norm_act_backward_into(out, da, y, coef, act, slope);
  return out;
}

void norm_act_backward_(const Tensor& da, const Tensor& y, const Tensor& coef, int64_t act, double slope) {
  norm_act_backward_into(da, da, dense(y), coef, act, slope);
}

Tensor norm_act_reduce(const Tensor& da_, const Tensor& y_, const Tensor& coef_, int64_t act, double slope) {
  const Tensor y = dense(y_), coef = checked_coef(coef_, y);
  check_grad(da_, y);
  const Shape s = shape_of(y, coef.size(1));
  const Tensor da = da_.contiguous(format_of(s));
  const Tensor sums = at::empty({(coef.size(0) + 1) / 2, coef.size(1), coef.size(2)}, coef.options());
  check_activation(
      grad_sums_pass(s, {y.const_data_ptr(), da.const_data_ptr(), nullptr}, y.scalar_type(),
                     coef.const_data_ptr<float>(), coef.size(0), activation(act, slope), sums.data_ptr<float>()),
      act, coef);
  return sums;
}

// `out` may be `da`. Returns the sums.
Tensor grad_stats_into(
    const Tensor& out, const Tensor& da_, const Tensor& y, const Tensor& coef_, int64_t act, double slope) {
  const Tensor coef = checked_coef(coef_, y);
  check_grad(da_, y);
  const Shape s = shape_of(y, coef.size(1));
  check_place(out, y, s);
  const Tensor da = da_.contiguous(format_of(s));
  const Tensor sums = at::empty({(coef.size(0) + 1) / 2, coef.size(1), coef.size(2)}, coef.options());
  check_activation(
      grad_sums_pass(s, {y.const_data_ptr(), da.const_data_ptr(), out.data_ptr()}, y.scalar_type(),
                     coef.const_data_ptr<float>(), coef.size(0), activation(act, slope), sums.data_ptr<float>()),
      act, coef);
  return sums;
}

std::tuple<Tensor, Tensor> grad_stats(
    const Tensor& da, const Tensor& y_, const Tensor& coef, int64_t act, double slope) {
  const Tensor y = dense(y_), out = new_tensor_like(y);
  return {out, grad_stats_into(out, da, y, coef, act, slope)};
}

Tensor grad_stats_(const Tensor& da, const Tensor& y, const Tensor& coef, int64_t act, double slope) {
  return grad_stats_into(da, da, dense(y), coef, act, slope);
}

Tensor batch_stats(const Tensor& y_, int64_t groups) {
  const Tensor y = dense(y_);
  TORCH_CHECK(y.numel() > 0, "expected at least one element, got a tensor ", y.sizes());  // as PyTorch does
  const Shape s = shape_of(y, groups);
  const Tensor stats = at::empty({3, groups, s.channels}, y.options().dtype(at::kFloat).memory_format(std::nullopt));
  batch_stats_pass(s, {y.const_data_ptr(), nullptr, nullptr}, y.scalar_type(), stats.data_ptr<float>());
  return stats;
}

// --- per-channel arithmetic, in double -------------------------------------------------------------------------------

// `x`, or `otherwise` for every channel, in each group.
std::vector<double> by_channel(const optional<Tensor>& x, double otherwise, int64_t groups, int64_t channels) {
  std::vector<double> values(groups * channels, otherwise);
  if (!x.has_value()) return values;
  TORCH_CHECK_VALUE(
      x->dim() == 1 && x->size(0) == channels, "expected a vector of ", channels, " channels, got ", x->sizes());
  const Tensor wide = x->to(at::kFloat).contiguous();
  for (int64_t g = 0; g < groups; ++g)
    std::copy_n(wide.const_data_ptr<float>(), channels, values.begin() + g * channels);
  return values;
}

Tensor coefficients(
    const Tensor& mean_, const Tensor& var_, const optional<Tensor>& weight_, const optional<Tensor>& bias_,
    const optional<Tensor>& shift_, double eps) {
  TORCH_CHECK_VALUE(
      mean_.dim() == 2 && mean_.sizes() == var_.sizes(), "expected mean and variance [groups, channels], got ",
      mean_.sizes(), " and ", var_.sizes());
  const Tensor mean = mean_.to(at::kFloat).contiguous(), var = var_.to(at::kFloat).contiguous();
  const int64_t groups = mean.size(0), channels = mean.size(1), row = groups * channels;
  const auto weights = by_channel(weight_, 1, groups, channels), biases = by_channel(bias_, 0, groups, channels),
             shifts = by_channel(shift_, 0, groups, channels);
  const Tensor coef = at::empty({4, groups, channels}, mean.options());
  const float *means = mean.const_data_ptr<float>(), *variances = var.const_data_ptr<float>();
  const double *weight = weights.data(), *bias = biases.data(), *shift = shifts.data();
  float *s = coef.data_ptr<float>(), *t = s + row, *mu = t + row, *rstd = mu + row;
#pragma omp simd
  for (int64_t i = 0; i < row; ++i) {
    const double m = static_cast<double>(means[i]) - shift[i];
    const double r = 1 / std::sqrt(static_cast<double>(variances[i]) + eps);
    s[i] = static_cast<float>(weight[i] * r);
    t[i] = static_cast<float>(bias[i] - m * weight[i] * r);
    mu[i] = static_cast<float>(m);
    rstd[i] = static_cast<float>(r);
  }
  return coef;
}

Tensor grad_coefficients(const Tensor& sums_, const Tensor& coef_, double count) {
  TORCH_CHECK_VALUE(
      coef_.dim() == 3 && coef_.size(0) == 4 && sums_.dim() == 3 && sums_.size(0) == 2 &&
          sums_.size(1) == coef_.size(1) && sums_.size(2) == coef_.size(2),
      "expected sums [2, groups, channels] and coefficients [4, groups, channels], got ", sums_.sizes(), " and ",
      coef_.sizes());
  TORCH_CHECK_TYPE(
      sums_.scalar_type() == at::kFloat && coef_.scalar_type() == at::kFloat, "expected float32 sums and coefficients");
  const Tensor sums = sums_.contiguous(), coef = coef_.contiguous(), out = at::empty_like(coef);
  const int64_t row = coef.size(1) * coef.size(2);
  const float *g = sums.const_data_ptr<float>(), *g_xhat = g + row;
  const float *s = coef.const_data_ptr<float>(), *mu = s + 2 * row, *rstd = s + 3 * row;
  float *result = out.data_ptr<float>(), *p = result + 2 * row, *q = result + 3 * row;
  std::copy_n(s, 2 * row, result);
#pragma omp simd
  for (int64_t i = 0; i < row; ++i) {
    const double scale = -static_cast<double>(s[i]) / count;
    const double slope = scale * rstd[i] * g_xhat[i];
    p[i] = static_cast<float>(slope);
    q[i] = static_cast<float>(scale * g[i] - slope * mu[i]);
  }
  return out;
}

// For each group in order: running = momentum*batch + (1 - momentum)*running, with the roundings of PyTorch's kernel:
// the mean in float, the batch's variance in double. `factor` [groups], where given, takes the place of `momentum`.
void update_running_(
    const Tensor& mean, const Tensor& var, const Tensor& stats_, const optional<Tensor>& shift_,
    const optional<Tensor>& factor_, double momentum) {
  TORCH_CHECK_VALUE(
      stats_.dim() == 3 && stats_.size(0) == 3 && mean.dim() == 1 && mean.size(0) == stats_.size(2) &&
          var.sizes() == mean.sizes(),
      "expected statistics [3, groups, channels] and running ones [channels], got ", stats_.sizes(), ", ",
      mean.sizes(), " and ", var.sizes());
  const auto dtype = mean.scalar_type();
  TORCH_CHECK_TYPE(
      stats_.scalar_type() == at::kFloat && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) &&
          var.scalar_type() == dtype && mean.is_contiguous() && var.is_contiguous(),
      "expected float32 statistics, and contiguous running ones of float32, bfloat16 or float16");
  const Tensor stats = stats_.contiguous();
  const int64_t groups = stats.size(1), channels = stats.size(2);
  const auto shifts = by_channel(shift_, 0, 1, channels);
  const auto factors = by_channel(factor_, static_cast<float>(momentum), 1, groups);
  const float* values = stats.const_data_ptr<float>();
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    T *means = mean.data_ptr<T>(), *variances = var.data_ptr<T>();
    for (int64_t g = 0; g < groups; ++g) {
      const float *batch = values + g * channels, *unbiased = values + (2 * groups + g) * channels;
      const float weight = static_cast<float>(factors[g]), keep = static_cast<float>(1 - factors[g]);
      for (int64_t c = 0; c < channels; ++c) {
        // Products and sums are rounded one by one: volatile keeps the compiler from fusing them.
        const volatile float fresh = weight * (batch[c] + static_cast<float>(shifts[c]));
        const volatile float old = keep * static_cast<float>(means[c]);
        const volatile float old_variance = keep * static_cast<float>(variances[c]);
        means[c] = static_cast<T>(fresh + old);
        variances[c] = static_cast<T>(static_cast<float>(factors[g] * unbiased[c] + old_variance));
      }
    }
  });
}

// Running statistics of several normalisations, as `update_running_` does one; `shifts` has an empty tensor for none.
void update_all_running_(
    at::TensorList means, at::TensorList variances, at::TensorList stats, at::TensorList shifts,
    at::ArrayRef<double> momenta) {
  TORCH_CHECK_VALUE(
      means.size() == variances.size() && means.size() == stats.size() && means.size() == shifts.size() &&
          means.size() == momenta.size(),
      "expected lists of one length, got ", means.size(), ", ", variances.size(), ", ", stats.size(), ", ",
      shifts.size(), " and ", momenta.size());
  for (size_t i = 0; i < means.size(); ++i) {
    const auto shift = shifts[i].numel() ? optional<Tensor>(shifts[i]) : std::nullopt;
    update_running_(means[i], variances[i], stats[i], shift, std::nullopt, momenta[i]);
  }
}

// --- several of the above in one call, which on small tensors costs more than what it does ---------------------------

// (act(s*y + t), coef) of a normalisation with the batch's `stats` [3, groups, C].
std::tuple<Tensor, Tensor> normalize(
    const Tensor& y, const Tensor& stats, const optional<Tensor>& weight, const optional<Tensor>& bias, double eps,
    int64_t act, double slope) {
  TORCH_CHECK_VALUE(
      stats.dim() == 3 && stats.size(0) == 3, "expected statistics [3, groups, channels], got ", stats.sizes());
  const Tensor coef = coefficients(stats.select(0, 0), stats.select(0, 1), weight, bias, std::nullopt, eps);
  return {norm_act(y, coef, act, slope), coef};
}

// (dy, sums) of its backward, over `count` values.
std::tuple<Tensor, Tensor> normalize_backward(
    const Tensor& da, const Tensor& y, const Tensor& coef, double count, int64_t act, double slope) {
  const Tensor sums = norm_act_reduce(da, y, coef, act, slope);
  return {norm_act_backward(da, y, grad_coefficients(sums, coef, count), act, slope), sums};
}

// The same, where dy takes the place of `da`; returns the sums.
Tensor normalize_backward_(
    const Tensor& da, const Tensor& y, const Tensor& coef, double count, int64_t act, double slope) {
  const Tensor sums = norm_act_reduce(da, y, coef, act, slope);
  norm_act_backward_(da, y, grad_coefficients(sums, coef, count), act, slope);
  return sums;
}

// coef (1, bias) [2, 1, channels] of what is not normalised.
Tensor bias_coefficients(const optional<Tensor>& bias, int64_t channels) {
  const Tensor coef = at::empty({2, 1, channels}, at::TensorOptions(at::kFloat));
  const auto shifts = by_channel(bias, 0, 1, channels);
  float* values = coef.data_ptr<float>();
  std::fill_n(values, channels, 1.f);
  std::transform(
      shifts.begin(), shifts.end(), values + channels, [](double shift) { return static_cast<float>(shift); });
  return coef;
}

// The threads that a parallel region of this library gets: at::get_num_threads(), unless it was built without OpenMP or
// runs on another OpenMP runtime than torch.
int64_t threads() {
  std::atomic<int64_t> seen{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++seen; });
  return seen;
}

// (blocks, bytes)
std::tuple<int64_t, int64_t> cached_memory_counts() {
  const MemoryCache cached = cached_memory();
  return {cached.blocks, cached.bytes};
}

}  // namespace
}  // namespace fastdcgan::cpu

TORCH_LIBRARY(fastdcgan_cpu, m) {
  m.def("norm_act(Tensor y, Tensor coef, int act, float slope) -> Tensor");
  m.def("norm_act_backward(Tensor da, Tensor y, Tensor coef, int act, float slope) -> Tensor");
  m.def("norm_act_(Tensor(a!) y, Tensor coef, int act, float slope) -> ()");
  m.def("norm_act_backward_(Tensor(a!) da, Tensor y, Tensor coef, int act, float slope) -> ()");
  m.def("norm_act_reduce(Tensor da, Tensor y, Tensor coef, int act, float slope) -> Tensor");
  m.def("grad_stats(Tensor da, Tensor y, Tensor coef, int act, float slope) -> (Tensor, Tensor)");
  m.def("grad_stats_(Tensor(a!) da, Tensor y, Tensor coef, int act, float slope) -> Tensor");
  m.def("batch_stats(Tensor y, int groups) -> Tensor");
  m.def(
      "coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? shift, float eps) -> Tensor");
  m.def("grad_coefficients(Tensor sums, Tensor coef, float count) -> Tensor");
  m.def(
      "update_running_(Tensor(a!) mean, Tensor(b!) var, Tensor stats, Tensor? shift, Tensor? factor, float momentum) "
      "-> ()");
  m.def(
      "update_all_running_(Tensor(a!)[] mean, Tensor(b!)[] var, Tensor[] stats, Tensor[] shift, float[] momentum) -> "
      "()");
  m.def(
      "normalize(Tensor y, Tensor stats, Tensor? weight, Tensor? bias, float eps, int act, float slope) "
      "-> (Tensor, Tensor)");
  m.def(
      "normalize_backward(Tensor da, Tensor y, Tensor coef, float count, int act, float slope) -> (Tensor, Tensor)");
  m.def(
      "normalize_backward_(Tensor(a!) da, Tensor y, Tensor coef, float count, int act, float slope) -> Tensor");
  m.def("bias_coefficients(Tensor? bias, int channels) -> Tensor");
  m.def("threads() -> int", fastdcgan::cpu::threads);
  m.def("cached_memory() -> (int, int)", fastdcgan::cpu::cached_memory_counts);
  m.def("release_memory() -> ()", fastdcgan::cpu::release_memory);
}

TORCH_LIBRARY_IMPL(fastdcgan_cpu, CompositeExplicitAutograd, m) {  // no tensor may say where
  m.impl("bias_coefficients", fastdcgan::cpu::bias_coefficients);
}

TORCH_LIBRARY_IMPL(fastdcgan_cpu, CPU, m) {
  m.impl("norm_act", fastdcgan::cpu::norm_act);
  m.impl("norm_act_backward", fastdcgan::cpu::norm_act_backward);
  m.impl("norm_act_", fastdcgan::cpu::norm_act_);
  m.impl("norm_act_backward_", fastdcgan::cpu::norm_act_backward_);
  m.impl("norm_act_reduce", fastdcgan::cpu::norm_act_reduce);
  m.impl("grad_stats", fastdcgan::cpu::grad_stats);
  m.impl("grad_stats_", fastdcgan::cpu::grad_stats_);
  m.impl("batch_stats", fastdcgan::cpu::batch_stats);
  m.impl("coefficients", fastdcgan::cpu::coefficients);
  m.impl("grad_coefficients", fastdcgan::cpu::grad_coefficients);
  m.impl("update_running_", fastdcgan::cpu::update_running_);
  m.impl("update_all_running_", fastdcgan::cpu::update_all_running_);
  m.impl("normalize", fastdcgan::cpu::normalize);
  m.impl("normalize_backward", fastdcgan::cpu::normalize_backward);
  m.impl("normalize_backward_", fastdcgan::cpu::normalize_backward_);
}
