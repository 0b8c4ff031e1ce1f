// Launches by csrc/cuda/device/launch.h, with the runtime of fake_runtime.cpp: prints of each whether it was early, and
// how often the loaded code was asked for.
//
//     launches PTX_VERSION PTX_VERSION_ON_ANOTHER_GPU
#include <cstdio>
#include <cstdlib>

#include "cuda/device/launch.h"

namespace fake {
extern int ptx_version, device, asked, early;
}
namespace gpu = fastdcgan::gpu;

__global__ void kernel(int) { gpu::await_kernels_before(); }
__global__ void another(int) { gpu::await_kernels_before(); }

int main(int, char** arguments) {
  const gpu::Launch shape{"kernel", 1, 32, 200 * 1024};
  const auto print = [] { std::printf("%d %d\n", std::exchange(fake::early, 0), std::exchange(fake::asked, 0)); };
  for (fake::device = 0; fake::device < 2; ++fake::device) {
    fake::ptx_version = std::atoi(arguments[1 + fake::device]);
    for (int i = 0; i < 2; ++i) gpu::launch_early(kernel, shape, 1), print();
  }
  fake::device = 0;
  gpu::launch_early(another, shape, 1), print();
  gpu::launch(kernel, shape, 1), print();
}
