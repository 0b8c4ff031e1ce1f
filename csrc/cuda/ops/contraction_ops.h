// The operators of torch.ops.fastdcgan_cuda for contractions. An operand is (x, y, coef, act, slope) and an epilogue
// (kind, y, coef, act, slope), as in fastdcgan/backends/base.py; kinds are those of epilogue.cuh. `stride`, `padding`,
// `dilation` and sizes are pairs. `groups` are those of statistics and coefficients: every vector has that many or one.
// `tile` is one of contraction_tiles.cuh, and `splits` parts of the sums are added up afterwards. `exact`: float as
// float, else as TF32.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastdcgan::cuda {

using std::optional;
using torch::stable::Tensor;

// x [N, C, H, W], weight [Co, C, kh, kw] (transposed: [C, Co, kh, kw]) -> [N, Co, *output_size] in channels_last, and
// the epilogue's vectors [rows, stat_groups, Co / fold]: with `fold`, channels are (tap, channel), and all taps count.
std::tuple<Tensor, Tensor> contract_op(
    const Tensor& x, const optional<Tensor>& y, const optional<Tensor>& coef, int64_t act, double slope,
    const Tensor& weight, bool transposed, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, std::vector<int64_t> output_size, int64_t e_kind, const optional<Tensor>& e_y,
    const optional<Tensor>& e_coef, int64_t e_act, double e_slope, int64_t groups, int64_t stat_groups, int64_t fold,
    int64_t tile, int64_t splits, bool exact);

// x [N, C, H, W] (gathered), linear [N, Cl, H', W'] -> [Cl, C, *kernel] in channels_last
Tensor contract_weight_grad_op(
    const Tensor& x, const optional<Tensor>& x_y, const optional<Tensor>& x_coef, int64_t x_act, double x_slope,
    const Tensor& linear, const optional<Tensor>& linear_y, const optional<Tensor>& linear_coef, int64_t linear_act,
    double linear_slope, std::vector<int64_t> kernel, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, int64_t groups, int64_t tile, int64_t splits, bool exact);

}  // namespace fastdcgan::cuda
