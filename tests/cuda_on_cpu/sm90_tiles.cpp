// Every tile that is compiled for sm_90a, each with some of the contractions. `ring`: bytes of the stages that it has to
// have.
#include "sm90_cases.h"
#include "cuda/gemm_sm90/sm90_tiles.cuh"

int main(int argc, char** argv) {
  using namespace test;
  namespace cuda = fastdcgan::cuda;
  const auto run_tile = [](const Case& c) {
    switch (c.number("tile", -1)) {
      case 7: return run_case<Multiplied<bf16>, cuda::Tile7, Op::conv, Op::weight_grad>(c);
      case 8: return run_case<Multiplied<fp16>, cuda::Tile8, Op::conv_transpose>(c);
      case 9: return run_case<Multiplied<bf16>, cuda::Tile9, Op::conv_transpose>(c);
      default: throw std::runtime_error("no such tile: " + c.text);
    }
  };
  return run_arguments(argc, argv, [&](const Case& c) {
    if (!run_tile(c)) return false;
    const size_t all = static_cast<size_t>(c.number("ring", 0)) + 1024, got = cuda_on_cpu::engine.shape().shared_bytes;
    return run(c.text + ": its ring", [&]() -> std::string {
      require(all == got, std::to_string(got) + " bytes of shared memory, not " + std::to_string(all));
      return {};
    });
  });
}
