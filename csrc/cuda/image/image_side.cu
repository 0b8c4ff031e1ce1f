// Operators on image_side_conv.cuh, image_side_transpose.cuh and image_side_weight_grad.cuh.
#include "cuda/image/image_side_conv.cuh"
#include "cuda/image/image_side_transpose.cuh"
#include "cuda/image/image_side_weight_grad.cuh"

#include "cuda/ops/image_side_ops.h"
#include "cuda/ops/tensors.h"

namespace fastdcgan::cuda {
namespace {

// An operand as the kernels read it, and the tensors that this takes.
struct OperandTensors {
  Tensor x;
  optional<Tensor> y, coef;
  RuntimeActivation act;

  OperandTensors(const Tensor& x_, const optional<Tensor>& y_, const optional<Tensor>& coef_, int64_t act_,
                 double slope_, bool channels_last)
      : x(channels_last ? laid_out(dense(x_), true) : dense(x_)),
        act(static_cast<int>(act_), static_cast<float>(slope_)) {
    STD_TORCH_CHECK(known_activation(act_), "unknown activation id ", act_);
    for (int64_t i = 0; i < 4; ++i)
      STD_TORCH_CHECK(x.size(i) < (int64_t{1} << 31), "a tensor ", shape_text(x), " is too large");
    if (y_.has_value()) {
      check_grad(*y_, x);
      y = laid_out(*y_, is_channels_last(x));
    }
    if (!coef_.has_value()) return;
    coef = checked_coef(*coef_, x);
    STD_TORCH_CHECK(coef->size(1) > 0 && x.size(0) % coef->size(1) == 0, "a batch of ", x.size(0), " can't have ",
                    coef->size(1), " statistics groups");
  }

  template <class T>
  ImageSideOperand<T> operand() const {
    ImageSideOperand<T> s{};
    s.x = data<T>(x), s.y = y.has_value() ? data<T>(*y) : nullptr, s.coef = data_or_null(coef);
    s.step_n = x.stride(0), s.step_c = x.stride(1), s.step_h = x.stride(2), s.step_w = x.stride(3);
    s.batch = size(0), s.channels = size(1), s.height = size(2), s.width = size(3);
    s.rows = coef.has_value() ? static_cast<int>(coef->size(0)) : 0;
    s.groups = coef.has_value() ? static_cast<int>(coef->size(1)) : 1;
    s.act = act;
    s.vectors = is_channels_last(x) && s.channels % kVec<T> == 0 && gpu::aligned(s.x) && gpu::aligned(s.y) &&
                gpu::aligned(s.coef);
    return s;
  }
  int size(int dim) const { return static_cast<int>(x.size(dim)); }
};

template <class T>
Weights<T> weights_of(const Tensor& w) {
  return {data<T>(w), w.stride(0), w.stride(1), w.stride(2), w.stride(3)};
}

ImageSideGeometry geometry_of(
    const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding) {
  for (const auto* pair : {&kernel, &stride, &padding})
    STD_TORCH_CHECK(pair->size() == 2, "expected a pair, got ", pair->size(), " numbers");
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(kernel[i] >= 1 && kernel[i] <= kMostKernel, "expected a kernel of 1 to ", kMostKernel, ", got ",
                    kernel[i]);
    STD_TORCH_CHECK(stride[i] >= 1 && stride[i] <= kMostStride, "expected a stride of 1 to ", kMostStride, ", got ",
                    stride[i]);
    STD_TORCH_CHECK(padding[i] >= 0 && padding[i] < (1 << 20), "expected a padding from 0 on, got ", padding[i]);
  }
  const auto number = [](int64_t i) { return static_cast<int>(i); };
  return {number(kernel[0]), number(kernel[1]),  number(stride[0]),
          number(stride[1]), number(padding[0]), number(padding[1])};
}

void check_image_channels(int64_t channels) {
  STD_TORCH_CHECK(channels >= 1 && channels <= kMostImageChannels, "expected 1 to ", kMostImageChannels,
                  " channels, got ", channels);
}

// `coef` of the epilogue as the kernels read it, kept alive by the caller.
optional<Tensor> epilogue_coef(int64_t kind, const optional<Tensor>& coef, int64_t channels) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 2 && (kind == 0 || coef.has_value()), "unknown epilogue ", kind);
  if (kind == ImageSideEpilogue::none) return std::nullopt;
  if (kind == ImageSideEpilogue::bias) return as_float(coef, channels);
  STD_TORCH_CHECK(coef->dim() == 3 && coef->size(0) >= 2 && coef->size(2) == channels,
                  "expected coefficients [2 or more, groups, ", channels, "], got ", shape_text(*coef));
  return as_float(*coef);
}

ImageSideEpilogue epilogue_of(int64_t kind, const optional<Tensor>& coef, int64_t act, double slope, int64_t batch) {
  STD_TORCH_CHECK(known_activation(act), "unknown activation id ", act);
  const int groups = kind == ImageSideEpilogue::activated ? static_cast<int>(coef->size(1)) : 1;
  STD_TORCH_CHECK(groups > 0 && batch % groups == 0, "a batch of ", batch, " can't have ", groups,
                  " statistics groups");
  return {static_cast<ImageSideEpilogue::Kind>(kind), data_or_null(coef), groups,
          {static_cast<int>(act), static_cast<float>(slope)}};
}

void check_weight(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == x.scalar_type(),
                  "expected a weight of four dimensions in the input's dtype, got ", shape_text(weight));
}

// [n, c, h, w], whose memory is NHWC where `channels_last` says so.
Tensor new_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last) {
  if (!channels_last) return torch::stable::new_empty(like, {n, c, h, w});
  return torch::stable::transpose(torch::stable::transpose(torch::stable::new_empty(like, {n, h, w, c}), 2, 3), 1, 2);
}

}  // namespace

Tensor image_side_conv_op(
    const Tensor& x_, const optional<Tensor>& y, const optional<Tensor>& coef, int64_t act, double slope,
    const Tensor& weight, std::vector<int64_t> stride, std::vector<int64_t> padding, int64_t e_kind,
    const optional<Tensor>& e_coef_, int64_t e_act, double e_slope) {
  const OnDevice on(x_);
  const OperandTensors x(x_, y, coef, act, slope, false);
  check_weight(weight, x.x), check_image_channels(x.x.size(1));
  STD_TORCH_CHECK(weight.size(1) == x.x.size(1), "expected a weight of ", x.x.size(1), " input channels, got ",
                  shape_text(weight));
  const ImageSideGeometry g = geometry_of({weight.size(2), weight.size(3)}, stride, padding);
  const int64_t channels = weight.size(0);
  const int64_t height = (x.size(2) + 2 * g.padding_y - g.kernel_y) / g.stride_y + 1;
  const int64_t width = (x.size(3) + 2 * g.padding_x - g.kernel_x) / g.stride_x + 1;
  STD_TORCH_CHECK(height > 0 && width > 0, "an image ", shape_text(x.x), " is smaller than the kernel");
  const optional<Tensor> e_coef = epilogue_coef(e_kind, e_coef_, channels);
  const ImageSideEpilogue epilogue = epilogue_of(e_kind, e_coef, e_act, e_slope, x.size(0));
  const Tensor out = new_image(x.x, x.size(0), channels, height, width, true);
  if (out.numel() == 0) return out;
  with_dtype(x.x, [&](auto type) {
    using T = decltype(type);
    const bool vectors = channels % kVec<T> == 0 && gpu::aligned(out.const_data_ptr());
    launch_image_side_conv(x.operand<T>(), weights_of<T>(weight), g, epilogue, mutable_data<T>(out),
                           static_cast<int>(height), static_cast<int>(width), static_cast<int>(channels), vectors,
                           on.stream);
  });
  return out;
}

Tensor image_side_conv_transpose_op(
    const Tensor& x_, const optional<Tensor>& y, const optional<Tensor>& coef, int64_t act, double slope,
    const Tensor& weight, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> output_size,
    int64_t e_kind, const optional<Tensor>& e_coef_, int64_t e_act, double e_slope, bool channels_last) {
  const OnDevice on(x_);
  const OperandTensors x(x_, y, coef, act, slope, true);
  check_weight(weight, x.x), check_image_channels(weight.size(1));
  STD_TORCH_CHECK(weight.size(0) == x.x.size(1), "expected a weight of ", x.x.size(1), " input channels, got ",
                  shape_text(weight));
  const ImageSideGeometry g = geometry_of({weight.size(2), weight.size(3)}, stride, padding);
  STD_TORCH_CHECK(output_size.size() == 2 && output_size[0] > 0 && output_size[1] > 0, "expected an output size");
  const int64_t channels = weight.size(1), height = output_size[0], width = output_size[1];
  const optional<Tensor> e_coef = epilogue_coef(e_kind, e_coef_, channels);
  const ImageSideEpilogue epilogue = epilogue_of(e_kind, e_coef, e_act, e_slope, x.size(0));
  const Tensor out = new_image(x.x, x.size(0), channels, height, width, channels_last);
  if (out.numel() == 0) return out;
  const int64_t steps[4] = {out.stride(0), out.stride(2), out.stride(3), out.stride(1)};
  with_dtype(x.x, [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto co) {
      launch_image_side_transpose<T, decltype(co)::value>(x.operand<T>(), weights_of<T>(weight), g, epilogue,
                                                      mutable_data<T>(out), static_cast<int>(height),
                                                      static_cast<int>(width), steps, on.stream);
    };
    switch (channels) {
      case 1: return launch(std::integral_constant<int, 1>{});
      case 2: return launch(std::integral_constant<int, 2>{});
      case 3: return launch(std::integral_constant<int, 3>{});
      default: return launch(std::integral_constant<int, 4>{});
    }
  });
  return out;
}

Tensor image_side_weight_grad_op(
    const Tensor& x_, const optional<Tensor>& x_y, const optional<Tensor>& x_coef, int64_t x_act, double x_slope,
    const Tensor& linear_, const optional<Tensor>& linear_y, const optional<Tensor>& linear_coef, int64_t linear_act,
    double linear_slope, std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
    bool channels_last) {
  const OnDevice on(x_);
  const OperandTensors x(x_, x_y, x_coef, x_act, x_slope, false);
  const OperandTensors linear(linear_, linear_y, linear_coef, linear_act, linear_slope, true);
  check_image_channels(x.x.size(1));
  STD_TORCH_CHECK(x.size(0) == linear.size(0) && x.x.scalar_type() == linear.x.scalar_type(),
                  "expected two batches of one size and dtype, got ", shape_text(x.x), " and ", shape_text(linear.x));
  STD_TORCH_CHECK(x.x.numel() > 0 && linear.x.numel() > 0, "expected at least one element");
  const ImageSideGeometry g = geometry_of(kernel, stride, padding);
  const Tensor dw = new_image(x.x, linear.size(1), x.size(1), g.kernel_y, g.kernel_x, channels_last);
  const int64_t steps[4] = {dw.stride(0), dw.stride(1), dw.stride(2), dw.stride(3)};
  optional<Tensor> partials;
  const auto allocate = [&](int64_t count) {
    partials = torch::stable::new_empty(x.x, {count}, ScalarType::Float);
    return mutable_data<float>(*partials);
  };
  with_dtype(x.x, [&](auto type) {
    using T = decltype(type);
    image_side_weight_grad_pass(x.operand<T>(), linear.operand<T>(), g, allocate, mutable_data<T>(dw), steps,
                                on.stream);
  });
  return dw;
}

std::vector<int64_t> image_side_limits_op() { return {kMostImageChannels, kMostKernel, kMostStride}; }

int64_t image_side_transpose_bytes_op(
    int64_t channels, int64_t wide, std::vector<int64_t> kernel, std::vector<int64_t> stride,
    std::vector<int64_t> padding) {
  check_image_channels(channels);
  const ImageSideGeometry g = geometry_of(kernel, stride, padding);
  const ImageSideTransposeTensor::Plan lowest(1, 1, 1, static_cast<int>(channels), static_cast<int>(wide), g, 0);
  return static_cast<int64_t>(lowest.shared_bytes());
}

}  // namespace fastdcgan::cuda
