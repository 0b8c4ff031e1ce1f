// Tensors of torch's stable ABI for the launchers: checks, memory format, device and stream. A host compiler, with the
// shim in the place of CUDA, makes of the same launchers a library for CPU tensors (tests/cuda_on_cpu).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <string>

#include "cuda/elementwise/pass.cuh"
#include "cuda/ops/elementwise_ops.h"

namespace fastdcgan::cuda {

using gpu::bf16;
using gpu::fp16;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

// Makes a tensor's device the current one, and finds the current stream of it.
class OnDevice {
 public:
#ifdef __CUDACC__
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<gpu::Stream>(current);
  }
#else
  explicit OnDevice(const Tensor&) {}
#endif

  gpu::Stream stream = nullptr;

#ifdef __CUDACC__
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline bool is_floating(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// Calls `f` with a value of the tensor's storage type. Throws for a dtype that is none of them.
template <class F>
void with_dtype(const Tensor& t, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default: STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline const float* data_or_null(const optional<Tensor>& t) { return t.has_value() ? data<float>(*t) : nullptr; }

// --- memory format ---------------------------------------------------------------------------------------------------

// Whether a tensor [N, C, H, W] lies as channels_last. The strides of dimensions of size 1 don't matter.
inline bool is_channels_last(const Tensor& t) {
  int64_t stride = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != stride) return false;
    stride *= t.size(dim);
  }
  return true;
}

inline Tensor laid_out(const Tensor& t, bool channels_last) {
  if (channels_last ? is_channels_last(t) : t.is_contiguous()) return t;
  return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A tensor [N, C, H, W] without gaps; where it has some, in the memory format that its strides are nearest to.
inline Tensor dense(const Tensor& y) {
  STD_TORCH_CHECK(y.dim() == 4, "expected a tensor [N, C, H, W], got ", shape_text(y));
  STD_TORCH_CHECK(is_floating(y), "expected float32, bfloat16 or float16");
  if (is_channels_last(y) || y.is_contiguous()) return y;
  return laid_out(y, y.stride(1) == 1);
}

// Whether a dense tensor is channels_last. A tensor with one channel or one pixel, which is contiguous too, counts as
// it.
inline Shape shape_of(const Tensor& y, int64_t groups) {
  STD_TORCH_CHECK(groups > 0 && groups <= kMostGroups && y.size(0) % groups == 0, "a batch of ", y.size(0),
                  " can't have ", groups, " statistics groups");
  const Shape shape{groups, y.size(0) / groups, y.size(1), y.size(2) * y.size(3), is_channels_last(y)};
  // 32 bits of a pass: channels (up to kVec of them to a row), the vectors of a channel.
  STD_TORCH_CHECK(shape.channels < (1 << 27) && shape.batch * shape.pixels < (int64_t{1} << 31),
                  "a group of ", shape.batch * shape.pixels, " pixels of ", shape.channels, " channels is too large");
  return shape;
}

// --- vectors per channel ---------------------------------------------------------------------------------------------

inline Tensor as_float(const Tensor& t) {
  const Tensor wide = t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

// A vector of `size`, in float.
inline optional<Tensor> as_float(const optional<Tensor>& t, int64_t size) {
  if (!t.has_value()) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size, "expected a vector [", size, "], got ", shape_text(*t));
  return as_float(*t);
}

// [rows, groups, C] on the device of `like`.
inline Tensor new_vectors(const Tensor& like, int64_t rows, int64_t groups, int64_t channels) {
  return torch::stable::new_empty(like, {rows, groups, channels}, ScalarType::Float);
}

// --- checks that elementwise passes and reductions share
// -----------------------------------------------------------------------

inline Activation activation(int64_t id, double slope) {
  STD_TORCH_CHECK(known_activation(id), "unknown activation id ", id);
  return {static_cast<int>(id), static_cast<float>(slope)};
}

// Where they may have learned slopes as one row more, `most` is 5.
inline Tensor checked_coef(const Tensor& coef, const Tensor& y, int64_t most = 4) {
  const int64_t rows = coef.dim() == 3 ? coef.size(0) : 0;
  STD_TORCH_CHECK(
      rows >= 2 && rows <= most && (rows != 3 || most == 5) && coef.size(2) == y.size(1), "expected coefficients [2 ",
      most == 5 ? "to 5" : "or 4", ", groups, ", y.size(1), "], got ", shape_text(coef));
  STD_TORCH_CHECK(coef.scalar_type() == ScalarType::Float, "expected float32 coefficients");
  return coef.is_contiguous() ? coef : torch::stable::contiguous(coef);
}

// Calls `f` with the activation; with the slopes of LeakyReLU where `coef` has an odd number of rows.
template <class F>
void with_slopes(const Tensor& coef, int64_t act, double slope, F&& f) {
  const Activation of_all = activation(act, slope);
  if (coef.size(0) % 2 == 0) return f(of_all);
  STD_TORCH_CHECK(static_cast<ActId>(act) == ActId::leaky_relu, "expected leaky_relu with slopes, got id ", act);
  f(LearnedSlope{static_cast<int>(coef.size(0)) - 1});
}

inline void check_grad(const Tensor& da, const Tensor& y) {
  bool same = da.dim() == y.dim() && da.scalar_type() == y.scalar_type();
  for (int64_t i = 0; same && i < y.dim(); ++i) same = da.size(i) == y.size(i);
  STD_TORCH_CHECK(same, "expected a gradient of the dtype and shape ", shape_text(y), ", got ", shape_text(da));
}

}  // namespace fastdcgan::cuda
