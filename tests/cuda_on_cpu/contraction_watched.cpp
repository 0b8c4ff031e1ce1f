// The contractions under sanitizers, with a small tile.
#include "contraction_cases.h"

using Small = fastdcgan::cuda::TileShape<32, 32, 32, 1, 2, 3, 2>;

int main(int argc, char** argv) {
  using namespace test;
  return run_arguments(argc, argv, [](const Case& c) { return run_any_case<Multiplied<bf16>, Small>(c); });
}
