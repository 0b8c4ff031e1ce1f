// The contractions in every type, with a tile that is small enough to overhang small tensors often.
#include "contraction_cases.h"

using Small = fastdcgan::cuda::TileShape<32, 32, 32, 1, 2, 3, 2>;

int main(int argc, char** argv) {
  using namespace test;
  return run_arguments(argc, argv, [](const Case& c) {
    switch (c.one_of("type", {"bf16", "fp16", "tf32", "fp32"})) {
      case 0: return run_any_case<Multiplied<bf16>, Small>(c);
      case 1: return run_any_case<Multiplied<fp16>, Small>(c);
      case 2: return run_any_case<Multiplied<float>, Small>(c);
      default: return run_any_case<Multiplied<float, true>, Small>(c);
    }
  });
}
