// How fast one thread of this processor is, from runs of a few milliseconds in all.
#pragma once

namespace fastdcgan::cpu {

struct Rates {
  double fma;        // GFLOP/s of float multiply-adds in registers
  double vdpbf16ps;  // GFLOP/s of that instruction in registers; 0 where the processor or the library has none
  double copy;       // GB/s, read and written, of a copy past the caches
};

// The best of several runs each.
Rates rates();

}  // namespace fastdcgan::cpu
