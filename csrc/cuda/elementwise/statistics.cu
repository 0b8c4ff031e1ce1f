// Operators on batch_stats.cuh and grad_sums.cuh.
#include "cuda/elementwise/batch_stats.cuh"
#include "cuda/elementwise/grad_sums.cuh"
#include "cuda/ops/tensors.h"

namespace fastdcgan::cuda {
namespace {

// Floats that live as long as this object, which torch's allocator keeps for the stream after that.
class Partials {
 public:
  explicit Partials(const Tensor& like) : like_(like), floats_(like) {}
  float* operator()(int64_t size) {
    floats_ = torch::stable::new_empty(like_, {size}, ScalarType::Float);
    return mutable_data<float>(floats_);
  }

 private:
  const Tensor& like_;
  Tensor floats_;
};

// The sums, and `g` in g_out where that is not null.
Tensor grad_sums(
    const Tensor& da_, const Tensor& y, const Tensor& coef_, int64_t act, double slope, const Tensor* g_out) {
  const OnDevice on(y);
  const Tensor coef = checked_coef(coef_, y, 5);
  check_grad(da_, y);
  const Shape shape = shape_of(y, coef.size(1));
  const Tensor sums = new_vectors(coef, (coef.size(0) + 1) / 2, coef.size(1), coef.size(2));
  if (shape.size() == 0) {
    Tensor empty = sums;
    return torch::stable::zero_(empty);
  }
  const Tensor da = laid_out(da_, shape.channels_last);
  Partials partials(coef);
  with_dtype(y, [&](auto type) {
    using T = decltype(type);
    T* g = g_out == nullptr ? nullptr : mutable_data<T>(*g_out);
    with_slopes(coef, act, slope, [&](auto functor) {
      grad_sums_pass(shape, data<T>(da), data<T>(y), data<float>(coef), static_cast<int>(coef.size(0)), functor, g,
                     std::ref(partials), mutable_data<float>(sums), on.stream);
    });
  });
  return sums;
}

}  // namespace

Tensor batch_stats_op(const Tensor& y_, int64_t groups) {
  STD_TORCH_CHECK(y_.numel() > 0, "expected at least one element, got a tensor ", shape_text(y_));
  const OnDevice on(y_);
  const Tensor y = dense(y_);
  const Shape shape = shape_of(y, groups);
  const Tensor stats = new_vectors(y, 3, groups, shape.channels);
  Partials partials(stats);
  with_dtype(y, [&](auto type) {
    using T = decltype(type);
    batch_stats_pass(shape, data<T>(y), std::ref(partials), mutable_data<float>(stats), on.stream);
  });
  return stats;
}

Tensor norm_act_reduce_op(const Tensor& da, const Tensor& y, const Tensor& coef, int64_t act, double slope) {
  return grad_sums(da, dense(y), coef, act, slope, nullptr);
}

std::tuple<Tensor, Tensor> grad_stats_op(
    const Tensor& da, const Tensor& y_, const Tensor& coef, int64_t act, double slope) {
  const Tensor y = dense(y_), g = torch::stable::empty_like(y);
  const Tensor sums = grad_sums(da, y, coef, act, slope, &g);
  return {g, sums};
}

}  // namespace fastdcgan::cuda
