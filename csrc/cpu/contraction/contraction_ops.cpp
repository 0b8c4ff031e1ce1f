// torch.ops.fastdcgan_cpu: the contractions.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "cpu/amx/amx_contractions.h"
#include "cpu/contraction/contraction.h"
#include "cpu/contraction/packed_weights.h"
#include "cpu/memory/memory.h"
#include "cpu/winograd/winograd.h"

// Of the operators: tests load a second library of them.
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

void check_winograd(const Contraction& c, bool winograd) {
  TORCH_CHECK_VALUE(
      !winograd || winograd_covers(c), "expected kernels of twice the stride, strides of 1 or 2 and no dilation for ",
      "minimal filtering, got kernels ", c.y.kernel, " and ", c.x.kernel, ", strides ", c.y.stride, " and ", c.x.stride,
      ", dilations ", c.y.dilation, " and ", c.x.dilation);
}

void check_halves(bool halves, bool winograd, c10::ScalarType dtype) {
  const bool tiles = on_tiles(at::kBFloat16);
  TORCH_CHECK_VALUE(
      !halves || (!winograd && dtype == at::kFloat && tiles), "expected tensors of Float, AMX and no minimal filtering for ",
      "products of halves, got ", dtype, ", ", tiles ? "" : "no ", "AMX, ", winograd ? "" : "no ", "filtering");
}

// Output and, for groups > 0, its stats. `by_channel`: [channels] for act(sum + t), [2 or more, 1, channels] for
// act(s*sum + t).
std::tuple<Tensor, Tensor> contraction(
    const Tensor& x_, const Tensor& weight_, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    IntArrayRef size, bool transposed, const optional<Tensor>& by_channel_, int64_t act, double slope, int64_t groups,
    bool winograd, bool halves) {
  const Tensor x = channels_last(x_, "an input");
  TORCH_CHECK_VALUE(
      weight_.dim() == 4 && weight_.size(transposed ? 0 : 1) == x.size(1), "expected a weight for ", x.size(1),
      " input channels, got one of shape ", weight_.sizes());
  TORCH_CHECK_TYPE(
      weight_.scalar_type() == x.scalar_type() || weight_.scalar_type() == at::kFloat, "expected a weight of dtype ",
      x.scalar_type(), x.scalar_type() == at::kFloat ? "" : " or Float", ", got ", weight_.scalar_type());
  Tensor weight = weight_;
  if (!weight.is_non_overlapping_and_dense()) weight = halves ? weight.contiguous() : weight.to(x.scalar_type());
  TORCH_CHECK_VALUE(
      groups >= 0 && (groups == 0 || x.size(0) % groups == 0), "a batch of ", x.size(0), " can't have ", groups,
      " statistics groups");
  const int64_t channels = weight.size(transposed ? 1 : 0);
  const IntArrayRef kernel = weight.sizes().slice(2);
  const Contraction c{
      x.size(0), x.size(1), channels, axis(x, 0, kernel, stride, padding, dilation, size[0], transposed),
      axis(x, 1, kernel, stride, padding, dilation, size[1], transposed)};
  check_winograd(c, winograd);
  check_halves(halves, winograd, x.scalar_type());
  Weight w{weight.const_data_ptr(), weight.stride(transposed ? 0 : 1), weight.stride(transposed ? 1 : 0),
           weight.stride(2), weight.stride(3)};
  const c10::Storage storage = weight.storage();
  if (weight.is_non_overlapping_and_dense()) {
    w.storage = &storage;
    w.bytes = static_cast<int64_t>(weight.nbytes());
    w.wide = weight.scalar_type() != x.scalar_type();
  }
  Tensor by_channel;
  if (by_channel_.has_value()) {
    by_channel = by_channel_->contiguous();
    TORCH_CHECK_VALUE(
        by_channel.size(-1) == channels &&
            (by_channel.dim() == 1 || (by_channel.dim() == 3 && by_channel.size(0) >= 2 && by_channel.size(1) == 1)),
        "expected a bias [", channels, "] or coefficients [2 or 4, 1, ", channels, "], got ", by_channel.sizes());
    TORCH_CHECK_TYPE(
        by_channel.scalar_type() == at::kFloat, "expected float32 coefficients, got ", by_channel.scalar_type());
  }
  const Tensor out = output(x, x.size(0), channels, size[0], size[1]);
  const auto stats_size = groups ? std::vector<int64_t>{3, groups, channels} : std::vector<int64_t>{0};
  const Tensor stats = at::empty(stats_size, at::TensorOptions(at::kFloat));
  Finish finish{nullptr, nullptr, {static_cast<int>(act), static_cast<float>(slope)}};
  if (by_channel.defined()) {
    const float* first = by_channel.const_data_ptr<float>();
    finish.scale = by_channel.dim() == 1 ? nullptr : first;
    finish.shift = by_channel.dim() == 1 ? first : first + channels;
  }
  if (groups) {
    finish.stats = stats.data_ptr<float>();
    finish.groups = groups;
  }
  if (halves && contract_halves(c, x.const_data_ptr(), w, out.data_ptr(), finish)) return {out, stats};
  const bool known = (winograd ? winograd_contract : contract)(
      c, x.scalar_type(), x.const_data_ptr(), w, out.data_ptr(), finish);
  TORCH_CHECK_VALUE(known, "unknown activation id ", act);
  return {out, stats};
}

std::tuple<Tensor, Tensor> conv(
    const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    IntArrayRef size, const optional<Tensor>& by_channel, int64_t act, double slope, int64_t groups, bool winograd,
    bool halves) {
  return contraction(x, weight, stride, padding, dilation, size, false, by_channel, act, slope, groups, winograd, halves);
}

std::tuple<Tensor, Tensor> conv_transpose(
    const Tensor& x, const Tensor& weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
    IntArrayRef size, const optional<Tensor>& by_channel, int64_t act, double slope, int64_t groups, bool winograd,
    bool halves) {
  return contraction(x, weight, stride, padding, dilation, size, true, by_channel, act, slope, groups, winograd, halves);
}

Tensor grad_of_weight(
    const Tensor& gathered_, const Tensor& linear_, IntArrayRef kernel, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool winograd, bool halves) {
  const Tensor gathered = channels_last(gathered_, "an input"), linear = channels_last(linear_, "a gradient");
  TORCH_CHECK_VALUE(
      gathered.size(0) == linear.size(0), "expected one batch size, got ", gathered.size(0), " and ", linear.size(0));
  TORCH_CHECK_TYPE(
      gathered.scalar_type() == linear.scalar_type(), "expected a gradient of dtype ", gathered.scalar_type(), ", got ",
      linear.scalar_type());
  const Contraction c{
      gathered.size(0), gathered.size(1), linear.size(1),
      axis(gathered, 0, kernel, stride, padding, dilation, linear.size(2), false),
      axis(gathered, 1, kernel, stride, padding, dilation, linear.size(3), false)};
  const Tensor out = output(gathered, c.out_channels, c.in_channels, kernel[0], kernel[1]);
  check_winograd(c, winograd);
  check_halves(halves, winograd, gathered.scalar_type());
  if (halves && weight_grad_halves(c, gathered.const_data_ptr(), linear.const_data_ptr(), out.data_ptr())) return out;
  (winograd ? winograd_weight_grad : weight_grad)(
      c, gathered.scalar_type(), gathered.const_data_ptr(), linear.const_data_ptr(), out.data_ptr());
  return out;
}

// (how many, bytes)
std::tuple<int64_t, int64_t> kept() {
  const KeptWeights found = kept_weights();
  return {found.count, found.bytes};
}

bool bfloat16_on_tiles() { return on_tiles(at::kBFloat16); }

}  // namespace
}  // namespace fastdcgan::cpu

TORCH_LIBRARY_FRAGMENT(FASTDCGAN_CPU_NAMESPACE, m) {
  m.def(
      "conv(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int[2] size, Tensor? by_channel, "
      "int act, float slope, int groups, bool winograd=False, bool halves=False) -> (Tensor, Tensor)");
  m.def(
      "conv_transpose(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int[2] size, "
      "Tensor? by_channel, int act, float slope, int groups, bool winograd=False, bool halves=False) -> (Tensor, Tensor)");
  m.def(
      "weight_grad(Tensor gathered, Tensor linear, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
      "bool winograd=False, bool halves=False) -> Tensor");
  m.def("kept_weights() -> (int, int)", fastdcgan::cpu::kept);
  m.def("bfloat16_on_tiles() -> bool", fastdcgan::cpu::bfloat16_on_tiles);
}

TORCH_LIBRARY_IMPL(FASTDCGAN_CPU_NAMESPACE, CPU, m) {
  m.impl("conv", fastdcgan::cpu::conv);
  m.impl("conv_transpose", fastdcgan::cpu::conv_transpose);
  m.impl("weight_grad", fastdcgan::cpu::grad_of_weight);
}
