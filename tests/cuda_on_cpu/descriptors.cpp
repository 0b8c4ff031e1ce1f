// Prints the matrix descriptors of tiles at the beginning of shared memory: what kernels of csrc/cuda add to their
// place.
#include <cstdio>

#include "cuda/device/wgmma.h"

int main() {
  namespace gpu = fastdcgan::gpu;
  const void* begin = cuda_on_cpu::engine.at_shared_address(0);
  for (const int apart : {0, 64 * 128})
    for (const int bytes : {0, 32, 16 * 128})
      std::printf(
          "%llu\n", static_cast<unsigned long long>(gpu::advanced(gpu::matrix_descriptor(begin, apart), bytes)));
}
