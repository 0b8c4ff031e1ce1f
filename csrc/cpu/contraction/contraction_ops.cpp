// torch.ops.fastdcgan_cpu: the contractions.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <vector>

#include "common/activations.h"
#include "cpu/contraction/algorithms.h"
#include "cpu/contraction/packed_weights.h"
#include "cpu/contraction/reorder_taps.h"
#include "cpu/memory/memory.h"

// The namespace of the operators: tests load a second library of them.
#ifndef FASTDCGAN_CPU_NAMESPACE
#define FASTDCGAN_CPU_NAMESPACE fastdcgan_cpu
#endif

namespace fastdcgan::cpu {
namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

Tensor channels_last(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(
      x.dim() == 4 && x.numel() > 0, "expected ", name, " [N, C, H, W] with elements, got one of shape ", x.sizes());
  TORCH_CHECK_VALUE(x.device().is_cpu(), "expected ", name, " on the CPU, got one on ", x.device());
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      "expected ", name, " of float32, bfloat16 or float16, got ", dtype);
  return x.contiguous(at::MemoryFormat::ChannelsLast);
}

Axis axis(const Tensor& x, int i, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
          int64_t out, bool transposed) {
  TORCH_CHECK_VALUE(
      kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0 && out > 0, "kernel ", kernel, ", stride ",
      stride, ", padding ", padding, " and dilation ", dilation, " make no output of size ", out);
  return {kernel[i], stride[i], padding[i], dilation[i], x.size(2 + i), out, transposed};
}

Tensor output(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return new_tensor({batch, channels, height, width}, like.scalar_type(), at::MemoryFormat::ChannelsLast);
}

const Algorithm& algorithm_of(
    const Contraction& c, c10::ScalarType dtype, bool stats, bool weight_grad, std::string_view name) {
  std::string names;
  for (const Algorithm* a : algorithms(c, dtype, stats, weight_grad)) {
    if (a->name == name) return *a;
    names += (names.empty() ? "" : ", ") + std::string(a->name);
  }
  TORCH_CHECK_VALUE(false, "no algorithm '", name, "' for this contraction of ", dtype, "; there are: ", names);
}

// Output and, for stat_groups > 0, its stats. `by_channel`: [channels] for act(sum + t), [2 or more, 1, channels] for
// act(s*sum + t). `caches`: the weight's packed form may be cached.
std::tuple<Tensor, Tensor> contraction(
    const Tensor& x_, const Tensor& weight_, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    IntArrayRef size, bool transposed, const optional<Tensor>& by_channel_, int64_t act, double slope,
    int64_t stat_groups, std::string_view algorithm, bool caches) {
  const Tensor x = channels_last(x_, "an input");
  TORCH_CHECK_VALUE(
      weight_.dim() == 4 && weight_.size(transposed ? 0 : 1) == x.size(1), "expected a weight for ", x.size(1),
      " input channels, got one of shape ", weight_.sizes());
  TORCH_CHECK_TYPE(
      weight_.scalar_type() == x.scalar_type() || weight_.scalar_type() == at::kFloat, "expected a weight of dtype ",
      x.scalar_type(), x.scalar_type() == at::kFloat ? "" : " or Float", ", got ", weight_.scalar_type());
  Tensor weight = weight_;
  if (!weight.is_non_overlapping_and_dense())
    weight = algorithm == "split_bf16" ? weight.contiguous() : weight.to(x.scalar_type());
  TORCH_CHECK_VALUE(
      stat_groups >= 0 && (stat_groups == 0 || x.size(0) % stat_groups == 0), "a batch of ", x.size(0), " can't have ",
      stat_groups, " statistics groups");
  const int64_t channels = weight.size(transposed ? 1 : 0);
  const IntArrayRef kernel = weight.sizes().slice(2);
  const Contraction c{
      x.size(0), x.size(1), channels, axis(x, 0, kernel, stride, padding, dilation, size[0], transposed),
      axis(x, 1, kernel, stride, padding, dilation, size[1], transposed)};
  const Algorithm& a = algorithm_of(c, x.scalar_type(), stat_groups > 0, false, algorithm);
  TORCH_CHECK_VALUE(
      with_activation<float>(static_cast<int>(act), 0.f, [](const auto&) {}), "unknown activation id ", act);
  Weight w{weight.const_data_ptr(), weight.stride(transposed ? 0 : 1), weight.stride(transposed ? 1 : 0),
           weight.stride(2), weight.stride(3)};
  const c10::Storage storage = weight.storage();
  if (weight.is_non_overlapping_and_dense()) {
    w.storage = caches ? &storage : nullptr;
    w.bytes = static_cast<int64_t>(weight.nbytes());
    w.wide = weight.scalar_type() != x.scalar_type();
  }
  Tensor by_channel;
  if (by_channel_.has_value()) {
    by_channel = by_channel_->contiguous();
    const int64_t rows = by_channel.size(0);
    TORCH_CHECK_VALUE(
        by_channel.size(-1) == channels &&
            (by_channel.dim() == 1 ||
             (by_channel.dim() == 3 && (rows == 2 || rows == 4) && by_channel.size(1) == 1)),
        "expected a bias [", channels, "] or coefficients [2 or 4, 1, ", channels, "], got ", by_channel.sizes());
    TORCH_CHECK_TYPE(
        by_channel.scalar_type() == at::kFloat, "expected float32 coefficients, got ", by_channel.scalar_type());
  }
  const Tensor out = output(x, x.size(0), channels, size[0], size[1]);
  const auto stats_size = stat_groups ? std::vector<int64_t>{3, stat_groups, channels} : std::vector<int64_t>{0};
  const Tensor stats = at::empty(stats_size, at::TensorOptions(at::kFloat));
  Epilogue epilogue{nullptr, nullptr, {static_cast<int>(act), static_cast<float>(slope)}};
  if (by_channel.defined()) {
    const float* first = by_channel.const_data_ptr<float>();
    epilogue.scale = by_channel.dim() == 1 ? nullptr : first;
    epilogue.shift = by_channel.dim() == 1 ? first : first + channels;
  }
  if (stat_groups) {
    epilogue.stats = stats.data_ptr<float>();
    epilogue.stat_groups = stat_groups;
  }
  a.contract(c, x.scalar_type(), x.const_data_ptr(), w, out.data_ptr(), epilogue);
  return {out, stats};
}

std::tuple<Tensor, Tensor> conv(
    const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    IntArrayRef size, const optional<Tensor>& by_channel, int64_t act, double slope, int64_t stat_groups,
    std::string_view algorithm, bool caches) {
  return contraction(
      x, weight, stride, padding, dilation, size, false, by_channel, act, slope, stat_groups, algorithm, caches);
}

std::tuple<Tensor, Tensor> conv_transpose(
    const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    IntArrayRef size, const optional<Tensor>& by_channel, int64_t act, double slope, int64_t stat_groups,
    std::string_view algorithm, bool caches) {
  return contraction(
      x, weight, stride, padding, dilation, size, true, by_channel, act, slope, stat_groups, algorithm, caches);
}

// `contiguous`: the result is, where that costs less here than for the caller; else channels_last.
Tensor grad_of_weight(
    const Tensor& gathered_, const Tensor& linear_, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, std::string_view algorithm, bool contiguous) {
  const Tensor gathered = channels_last(gathered_, "an input"), linear = channels_last(linear_, "a gradient");
  TORCH_CHECK_VALUE(
      gathered.size(0) == linear.size(0), "expected one batch size, got ", gathered.size(0), " and ", linear.size(0));
  TORCH_CHECK_TYPE(
      gathered.scalar_type() == linear.scalar_type(), "expected a gradient of dtype ", gathered.scalar_type(), ", got ",
      linear.scalar_type());
  Contraction c{
      gathered.size(0), gathered.size(1), linear.size(1),
      axis(gathered, 0, kernel, stride, padding, dilation, linear.size(2), false),
      axis(gathered, 1, kernel, stride, padding, dilation, linear.size(3), false)};
  const auto dtype = gathered.scalar_type();
  const Algorithm& a = algorithm_of(c, dtype, false, true, algorithm);
  c.contiguous = contiguous && a.can_contiguous && a.can_contiguous(c, dtype);
  const Tensor out = new_tensor(
      {c.out_channels, c.in_channels, kernel[0], kernel[1]}, dtype,
      c.contiguous ? at::MemoryFormat::Contiguous : at::MemoryFormat::ChannelsLast);
  a.weight_grad(c, dtype, gathered.const_data_ptr(), linear.const_data_ptr(), out.data_ptr());
  if (!contiguous || c.contiguous || dtype != at::kFloat || !can_reorder_taps(c.taps())) return out;
  const Tensor reordered = new_tensor(out.sizes(), dtype, at::MemoryFormat::Contiguous);
  reorder_taps(
      out.const_data_ptr<float>(), c.out_channels, c.taps(), c.in_channels, reordered.data_ptr<float>());
  return reordered;
}

// The names of the algorithms for an operator, in the order of algorithms.h. Sizes of tensors make no difference to
// which can run. Channels: of what is read and of what is written; of the gathered and of the linear operand for
// `weight_grad`.
std::vector<std::string> names_of_algorithms(
    std::string_view op, int64_t in_channels, int64_t out_channels, IntArrayRef kernel, IntArrayRef stride,
    IntArrayRef dilation, at::ScalarType dtype, bool stats) {
  TORCH_CHECK_VALUE(
      op == "conv" || op == "conv_transpose" || op == "weight_grad",
      "expected 'conv', 'conv_transpose' or 'weight_grad', got '", op, "'");
  const auto axis = [&](int i) { return Axis{kernel[i], stride[i], 0, dilation[i], 1, 1, op == "conv_transpose"}; };
  std::vector<std::string> names;
  const Contraction c{1, in_channels, out_channels, axis(0), axis(1)};
  for (const Algorithm* a : algorithms(c, dtype, stats, op == "weight_grad")) names.emplace_back(a->name);
  return names;
}

// (how many, bytes)
std::tuple<int64_t, int64_t> packed_weights_cached() {
  const PackedWeights found = packed_weights();
  return {found.count, found.bytes};
}

}  // namespace
}  // namespace fastdcgan::cpu

TORCH_LIBRARY_FRAGMENT(FASTDCGAN_CPU_NAMESPACE, m) {
  m.def(
      "conv(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int[2] size, Tensor? by_channel, "
      "int act, float slope, int stat_groups, str algorithm, bool caches=True) -> (Tensor, Tensor)");
  m.def(
      "conv_transpose(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int[2] size, "
      "Tensor? by_channel, int act, float slope, int stat_groups, str algorithm, bool caches=True) "
      "-> (Tensor, Tensor)");
  m.def(
      "weight_grad(Tensor gathered, Tensor linear, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
      "str algorithm, bool contiguous=False) -> Tensor");
  m.def(
      "algorithms(str op, int in_channels, int out_channels, int[2] kernel, int[2] stride, int[2] dilation, "
      "ScalarType dtype, bool stats) -> str[]",
      fastdcgan::cpu::names_of_algorithms);
  m.def("packed_weights() -> (int, int)", fastdcgan::cpu::packed_weights_cached);
  m.def("amx_usable() -> bool", fastdcgan::cpu::amx_usable);
}

TORCH_LIBRARY_IMPL(FASTDCGAN_CPU_NAMESPACE, CPU, m) {
  m.impl("conv", fastdcgan::cpu::conv);
  m.impl("conv_transpose", fastdcgan::cpu::conv_transpose);
  m.impl("weight_grad", fastdcgan::cpu::grad_of_weight);
}
