// A weight of bfloat16 as panels of B whose rows lie two by two, as instructions that add products of pairs want them.
#pragma once

#include <c10/util/BFloat16.h>

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

// Where element (k, n) of B lies in a panel of `width` columns.
constexpr int64_t place_of_pair(int64_t k, int64_t n, int64_t width) { return (k / 2 * width + n) * 2 + k % 2; }

// [panel][term][row of DepthOrder with this `unit`][column]: the `term`-th of `terms` that a float is split into.
void pack_pairs(
    const Contraction&, const Weight&, int64_t unit, c10::BFloat16* to, int64_t term = 0, int64_t terms = 1);

}  // namespace fastdcgan::cpu
