// Operators on norm_act.cuh.
#include "cuda/elementwise/norm_act.cuh"

#include "cuda/ops/tensors.h"

namespace fastdcgan::cuda {

Tensor norm_act_op(const Tensor& y_, const Tensor& coef_, int64_t act, double slope) {
  const OnDevice on(y_);
  const Tensor y = dense(y_), coef = checked_coef(coef_, y, 5), out = torch::stable::empty_like(y);
  const Shape shape = shape_of(y, coef.size(1));
  if (shape.size() == 0) return out;
  with_dtype(y, [&](auto type) {
    using T = decltype(type);
    with_slopes(coef, act, slope, [&](auto functor) {
      norm_act_pass(shape, data<T>(y), data<float>(coef), functor, mutable_data<T>(out), on.stream);
    });
  });
  return out;
}

Tensor norm_act_backward_op(const Tensor& da_, const Tensor& y_, const Tensor& coef_, int64_t act, double slope) {
  const OnDevice on(y_);
  const Tensor y = dense(y_), coef = checked_coef(coef_, y, 5), dy = torch::stable::empty_like(y);
  check_grad(da_, y);
  const Shape shape = shape_of(y, coef.size(1));
  if (shape.size() == 0) return dy;
  const Tensor da = laid_out(da_, shape.channels_last);
  with_dtype(y, [&](auto type) {
    using T = decltype(type);
    with_slopes(coef, act, slope, [&](auto functor) {
      norm_act_backward_pass(shape, data<T>(da), data<T>(y), data<float>(coef), static_cast<int>(coef.size(0)), functor,
                             mutable_data<T>(dy), on.stream);
    });
  });
  return dy;
}

}  // namespace fastdcgan::cuda
