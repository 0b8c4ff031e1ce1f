// The contractions on AMX tiles: contractions.h, on the same terms.
#pragma once

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

// Whether those of `dtype` run on tiles in this process.
bool on_tiles(c10::ScalarType dtype);

void contract_on_tiles(const Contraction&, const void* in, const Weight&, void* out, const Finish&);
void scatter_on_tiles(const Contraction&, const void* in, const Weight&, void* out, const Finish&);
void weight_grad_on_tiles(const Contraction&, const void* gathered, const void* linear, void* out);

// Those of float as three products of bfloat16 halves (halves.h), for a weight whose storage is given. False if that gives
// no result: the activation is unknown, or what is multiplied is infinite, NaN or too large.
bool contract_halves(const Contraction&, const void* in, const Weight&, void* out, const Finish&);
bool weight_grad_halves(const Contraction&, const void* gathered, const void* linear, void* out);

}  // namespace fastdcgan::cpu
