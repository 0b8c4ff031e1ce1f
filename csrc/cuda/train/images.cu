// The operator on images.cuh.
#include "cuda/train/images.cuh"

#include "cuda/ops/tensors.h"
#include "cuda/ops/training_ops.h"

namespace fastdcgan::cuda {

Tensor images_op(const Tensor& pixels_, const optional<Tensor>& flip_, ScalarType dtype) {
  STD_TORCH_CHECK(pixels_.dim() == 4 && pixels_.scalar_type() == ScalarType::Byte,
                  "expected uint8 images [N, H, W, C], got ", shape_text(pixels_));
  STD_TORCH_CHECK(!flip_.has_value() || (flip_->scalar_type() == ScalarType::Bool && flip_->dim() == 1 &&
                                         flip_->size(0) == pixels_.size(0)),
                  "expected a mask of ", pixels_.size(0), " booleans");
  const OnDevice on(pixels_);
  const Tensor pixels = pixels_.is_contiguous() ? pixels_ : torch::stable::contiguous(pixels_);
  optional<Tensor> flip = flip_;
  if (flip.has_value() && !flip->is_contiguous()) flip = torch::stable::contiguous(*flip);
  const int64_t n = pixels.size(0), height = pixels.size(1), width = pixels.size(2), channels = pixels.size(3);
  STD_TORCH_CHECK(height * width * channels < (int64_t{1} << 31), "images of ", height * width * channels,
                  " values are too large");
  const Tensor out = torch::stable::new_empty(pixels, {n, height, width, channels}, dtype);
  const ImageShape shape{n, static_cast<int>(height), static_cast<int>(width), static_cast<int>(channels)};
  with_dtype(out, [&](auto type) {
    using T = decltype(type);
    images_pass(shape, data<uint8_t>(pixels), flip.has_value() ? data<bool>(*flip) : nullptr, mutable_data<T>(out),
                on.stream);
  });
  // NHWC in memory is channels_last.
  return torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2);
}

}  // namespace fastdcgan::cuda
