#include "cpu/amx/amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>
#endif

namespace fastdcgan::cpu::amx {

#if defined(__x86_64__) && defined(__linux__)

namespace {

bool has_instructions() {
  constexpr unsigned int kBFloat16 = 1u << 22, kTile = 1u << 24;  // of EDX, leaf 7
  unsigned int a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBFloat16) && (d & kTile);
}

// Linux keeps tile registers of processes alone that have asked for them.
bool granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool capped() {
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  return cap && std::string_view(cap) == "avx512";
}

}  // namespace

bool usable() {
  static const bool found = !capped() && has_instructions() && granted();
  return found;
}

#else

bool usable() { return false; }

#endif

}  // namespace fastdcgan::cpu::amx
