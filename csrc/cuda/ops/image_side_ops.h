// The operators of torch.ops.fastdcgan_cuda for image-side layers. An operand is (x, y, coef, act, slope) and an
// epilogue (kind, coef, act, slope), as in fastdcgan/backends/base.py; `stride` and `padding` are pairs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace fastdcgan::cuda {

using std::optional;
using torch::stable::Tensor;

// x [N, 1..4, H, W], weight [C, 1..4, kh, kw] -> [N, C, H', W'], channels_last
Tensor image_side_conv_op(
    const Tensor& x, const optional<Tensor>& y, const optional<Tensor>& coef, int64_t act, double slope,
    const Tensor& weight, std::vector<int64_t> stride, std::vector<int64_t> padding, int64_t e_kind,
    const optional<Tensor>& e_coef, int64_t e_act, double e_slope);

// x [N, C, H, W], weight [C, 1..4, kh, kw] -> [N, 1..4, *output_size]
Tensor image_side_conv_transpose_op(
    const Tensor& x, const optional<Tensor>& y, const optional<Tensor>& coef, int64_t act, double slope,
    const Tensor& weight, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> output_size,
    int64_t e_kind, const optional<Tensor>& e_coef, int64_t e_act, double e_slope, bool channels_last);

// x [N, 1..4, H, W] (gathered), linear [N, C, H', W'] -> [C, 1..4, *kernel]
Tensor image_side_weight_grad_op(
    const Tensor& x, const optional<Tensor>& x_y, const optional<Tensor>& x_coef, int64_t x_act, double x_slope,
    const Tensor& linear, const optional<Tensor>& linear_y, const optional<Tensor>& linear_coef, int64_t linear_act,
    double linear_slope, std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
    bool channels_last);

// The most channels on the image's side, and the most of a kernel and of a stride.
std::vector<int64_t> image_side_limits_op();

// Bytes of shared memory that a block of image_side_conv_transpose of 16-bit numbers takes at least.
int64_t image_side_transpose_bytes_op(
    int64_t channels, int64_t wide, std::vector<int64_t> kernel, std::vector<int64_t> stride,
    std::vector<int64_t> padding);

}  // namespace fastdcgan::cuda
