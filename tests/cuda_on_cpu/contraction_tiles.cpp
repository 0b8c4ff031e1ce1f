// Every tile that is compiled for GPUs, each with one of the contractions, where also two tensors to a factor fit.
#include "contraction_cases.h"

int main(int argc, char** argv) {
  using namespace test;
  namespace cuda = fastdcgan::cuda;
  cuda_on_cpu::options.shared_bytes = 163 << 10;
  return run_arguments(argc, argv, [](const Case& c) {
    switch (c.number("tile", -1)) {
      case 0: return run_case<Multiplied<bf16>, cuda::Tile0, Op::conv>(c);
      case 1: return run_case<Multiplied<bf16>, cuda::Tile1, Op::conv_transpose>(c);
      case 2: return run_case<Multiplied<bf16>, cuda::Tile2, Op::weight_grad>(c);
      case 3: return run_case<Multiplied<bf16>, cuda::Tile3, Op::conv>(c);
      case 4: return run_case<Multiplied<bf16>, cuda::Tile4, Op::conv_transpose>(c);
      case 5: return run_case<Multiplied<float>, cuda::Tile5, Op::weight_grad>(c);
      case 6: return run_case<Multiplied<float, true>, cuda::Tile6, Op::conv>(c);
      default: throw std::runtime_error("no such tile: " + c.text);
    }
  });
}
