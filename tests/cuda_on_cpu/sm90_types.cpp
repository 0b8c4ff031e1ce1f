// The contractions for sm_90a, with the narrowest tile.
#include "sm90_cases.h"

using Narrow = fastdcgan::cuda::Sm90Shape<64, 2, 96 * 1024>;

int main(int argc, char** argv) {
  using namespace test;
  return run_arguments(argc, argv, [](const Case& c) {
    if (c.word("refused") != "none")
      return run_refused_case<Multiplied<bf16>, Narrow, Op::conv, Op::conv_transpose, Op::weight_grad>(c);
    if (c.one_of("type", {"bf16", "fp16"}) == 0) return run_any_case<Multiplied<bf16>, Narrow>(c);
    return run_any_case<Multiplied<fp16>, Narrow>(c);
  });
}
