// What Python may set in the library of the operators on CPU tensors.
#include "cuda/image/image_side_transpose_tensor.cuh"

extern "C" void cuda_on_cpu_set_order(int order, unsigned seed) {
  cuda_on_cpu::options.order = static_cast<cuda_on_cpu::Order>(order);
  cuda_on_cpu::options.seed = seed;
}

extern "C" void cuda_on_cpu_set_multiprocessors(int count) { cuda_on_cpu::options.multiprocessors = count; }

// Of the lowest tile.
extern "C" int64_t cuda_on_cpu_narrow_transpose_bytes(
    int channels, int wide, int kernel_y, int kernel_x, int stride_y, int stride_x, int padding_y, int padding_x) {
  const fastdcgan::cuda::NarrowGeometry g{kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x};
  return fastdcgan::cuda::NarrowTransposeTensor::Plan(1, 1, 1, channels, wide, g, 0).shared_bytes();
}
