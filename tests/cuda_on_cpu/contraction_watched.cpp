// The contractions under sanitizers, with a small tile: what 16-bit numbers and float have of their own, each once.
#include "contraction_cases.h"

using Small = fastdcgan::cuda::TileShape<32, 32, 32, 1, 2, 3, 2>;

int main(int argc, char** argv) {
  using namespace test;
  return run_arguments(argc, argv, [](const Case& c) {
    if (c.one_of("type", {"bf16", "fp32"}) == 1)
      return run_case<Multiplied<float, true>, Small, Op::conv_transpose>(c);
    return run_case<Multiplied<bf16>, Small, Op::conv, Op::weight_grad>(c);
  });
}
