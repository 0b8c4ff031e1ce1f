// The contractions of bfloat16 on AMX tiles: contractions.h, on the same terms.
#pragma once

#include "contractions.h"

namespace fastdcgan::cpu {

// Whether those of `dtype` run on tiles in this process.
bool on_tiles(c10::ScalarType dtype);

void contract_on_tiles(const Contraction&, const void* in, const Weight&, void* out, const Finish&);
void scatter_on_tiles(const Contraction&, const void* in, const Weight&, void* out, const Finish&);
void weight_grad_on_tiles(const Contraction&, const void* gathered, const void* linear, void* out);

}  // namespace fastdcgan::cpu
