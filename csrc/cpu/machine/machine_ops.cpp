// torch.ops.fastdcgan_cpu: what the processor is and has.
#include <torch/library.h>

#include <tuple>

#include "cpu/machine/rates.h"

namespace fastdcgan::cpu {
namespace {

// (fma, vdpbf16ps, copy)
std::tuple<double, double, double> rates_of_one_thread() {
  const Rates found = rates();
  return {found.fma, found.vdpbf16ps, found.copy};
}

}  // namespace
}  // namespace fastdcgan::cpu

TORCH_LIBRARY_FRAGMENT(fastdcgan_cpu, m) {
  m.def("rates() -> (float, float, float)", fastdcgan::cpu::rates_of_one_thread);
}
