// What Python may set in the library of the operators on CPU tensors.
#include "cuda_on_cpu.h"

static const size_t shared_bytes_of_sm90 = cuda_on_cpu::options.shared_bytes = 227 << 10;

extern "C" void cuda_on_cpu_set_order(int order, unsigned seed) {
  cuda_on_cpu::options.order = static_cast<cuda_on_cpu::Order>(order);
  cuda_on_cpu::options.seed = seed;
}

extern "C" void cuda_on_cpu_set_multiprocessors(int count) { cuda_on_cpu::options.multiprocessors = count; }
