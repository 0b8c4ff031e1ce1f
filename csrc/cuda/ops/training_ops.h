// The operators of torch.ops.fastdcgan_cuda that training needs beside the blocks; fastdcgan/dispatch/training_ops.py finds them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastdcgan::cuda {

using std::optional;
using torch::stable::Tensor;

// adam.cu. `steps[i]` has a counter for each chunk of tensor i; a copy with no elements is none; with `masters`,
// the copies are the parameters, and what somebody has set in them since the last step takes hold.
void adam_op(
    std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
    std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> copies, std::vector<Tensor> steps, double lr,
    const optional<Tensor>& lr_tensor, double beta1, double beta2, double eps, double weight_decay, bool decoupled,
    bool maximize, bool masters, const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf);

// losses.cu: losses [parts], probabilities [parts], and the gradient of the losses' sum, or nothing; all in float32.
std::tuple<Tensor, Tensor, Tensor> bce_with_logits_op(const Tensor& logits, std::vector<double> labels, bool with_grad);

// images.cu: uint8 [N, H, W, C] -> [N, C, H, W], channels_last.
Tensor images_op(const Tensor& pixels, const optional<Tensor>& flip, torch::headeronly::ScalarType dtype);

}  // namespace fastdcgan::cuda
