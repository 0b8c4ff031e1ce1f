// The contractions of few pixels: of each weight only few rows are multiplied, so packing it would take longer than
// that. It is read once, where it lies, and what the pixels read is gathered in its order.
#pragma once

#include "cpu/contraction/contraction.h"

namespace fastdcgan::cpu {

// Where a weight's slowest axis has whole vectors behind it.
bool can_unpacked(const Contraction& c);

void unpacked_contract(const Contraction&, c10::ScalarType, const void* in, const Weight&, void* out, const Epilogue&);
void unpacked_weight_grad(const Contraction&, c10::ScalarType, const void* gathered, const void* linear, void* out);

}  // namespace fastdcgan::cpu
