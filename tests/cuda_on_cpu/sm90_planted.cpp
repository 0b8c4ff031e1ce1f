// Contractions for sm_90a, for copies of its source in which a bug is planted.
#include "sm90_cases.h"

using Narrow = fastdcgan::cuda::Sm90Shape<64, 2, 96 * 1024>;

int main(int argc, char** argv) {
  using namespace test;
  return run_arguments(
      argc, argv, [](const Case& c) { return run_case<Multiplied<bf16>, Narrow, Op::conv, Op::weight_grad>(c); });
}
