// contraction_cases.h with tiles for sm_90a.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "contraction_cases.h"
#include "cuda/gemm_sm90/sm90_contraction.cuh"

namespace test {

inline const size_t shared_bytes_of_sm90 = cuda_on_cpu::options.shared_bytes = 227 << 10;

template <Op op, class T, class Math, int kN, int kBlocks, int kRing>
struct Runner<op, T, Math, cuda::Sm90Shape<kN, kBlocks, kRing>> {
  using Shape = cuda::Sm90Shape<kN, kBlocks, kRing>;
  static int64_t slots(const Problem<T>& p) { return cuda::sm90_slots<op>(p); }
  static void run(const Problem<T>& p, float* workspace) {
    if (p.gathered.prologue != Prologue::none || p.other.prologue != Prologue::none)
      return cuda::run_sm90<cuda::Sm90Contraction<op, T, Shape, true>>(p, workspace, nullptr);
    cuda::run_sm90<cuda::Sm90Contraction<op, T, Shape, false>>(p, workspace, nullptr);
  }
};

// Runs a case of one of `ops` that has no TMA tiles: the word `refused` says why not, with _ for spaces.
template <class Math, class Shape, Op... ops>
bool run_refused_case(const Case& c) {
  const Op op = static_cast<Op>(c.one_of("op", {"conv", "conv_transpose", "weight_grad"}));
  std::string why = c.word("refused");
  std::replace(why.begin(), why.end(), '_', ' ');
  return run(c.text, [&]() -> std::string {
    try {
      ((op == ops && (ContractionTest<ops, Math, Shape>(c)(), true)) || ...);
    } catch (const std::invalid_argument& e) {
      require(std::string(e.what()).find(why) != std::string::npos, "refused for " + std::string(e.what()));
      return why;
    }
    throw std::runtime_error("not refused");
  });
}

}  // namespace test
