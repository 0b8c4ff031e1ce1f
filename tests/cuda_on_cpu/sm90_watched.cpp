// The contractions for sm_90a under sanitizers, with the narrowest tile.
#include "sm90_cases.h"

using Narrow = fastdcgan::cuda::Sm90Shape<64, 2, 96 * 1024>;

int main(int argc, char** argv) {
  using namespace test;
  return run_arguments(argc, argv, [](const Case& c) { return run_any_case<Multiplied<bf16>, Narrow>(c); });
}
