// The ways to run a contraction. Python chooses among them (fastdcgan/dispatch/router.py); nothing here does.
#pragma once

#include <string>
#include <vector>

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

// Either `contract` (of `conv` and `conv_transpose`) or `weight_grad` may be null: then there is no such way.
struct Algorithm {
  const char* name;
  bool (*can_run)(const Contraction&, c10::ScalarType, bool stats);
  void (*contract)(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);
  void (*weight_grad)(const Contraction&, c10::ScalarType, const void* gathered, const void* linear, void* out);
  // Whether the weight's gradient may be contiguous; null: no.
  bool (*can_contiguous)(const Contraction&, c10::ScalarType) = nullptr;
};

// Those that can run a contraction, in the order in which they are worth trying: an earlier one was faster than the
// later ones wherever it was measured, but for `unpacked`, Winograd's and `split_bf16`, which are last: whether these
// are faster depends on the sizes. Those of `avx512_bf16` are faster than those after them on some processors only.
// `stats`: with statistics of the output.
std::vector<const Algorithm*> algorithms(const Contraction&, c10::ScalarType, bool stats, bool weight_grad);

// Whether the library was compiled for AMX and the process may use it.
bool amx_usable();

}  // namespace fastdcgan::cpu
