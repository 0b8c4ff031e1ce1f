#include "cpu/amx/amx.h"

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastdcgan::cpu::amx {
namespace {

constexpr int kFloats = kRowBytes / sizeof(float);

struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) unsigned char data[kRows][kRowBytes] = {};

  void clear() { std::memset(data, 0, sizeof data); }
  void clear_below() { std::memset(data[rows], 0, (kRows - rows) * kRowBytes); }
};

struct Registers {
  bool configured = false;
  Tile tiles[kTiles];
};

thread_local Registers registers;
std::atomic<int64_t> configured_threads{0}, products{0};

[[noreturn]] void fault(const std::string& what) { throw std::logic_error("AMX: " + what); }

Tile& tile(int number) {
  if (number < 0 || number >= kTiles) fault("there is no tile " + std::to_string(number));
  if (!registers.configured) fault("tile " + std::to_string(number) + " is used, but this thread has configured none");
  Tile& found = registers.tiles[number];
  if (found.rows == 0 || found.row_bytes == 0) fault("tile " + std::to_string(number) + " has no shape");
  return found;
}

float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.f, x) : x; }

float widened(const unsigned char* bfloat16) {
  uint16_t bits;
  std::memcpy(&bits, bfloat16, sizeof bits);
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return flushed(x);
}

// One row of the sums.
void multiply_row(float* sum, const unsigned char* a, const Tile& b) {
  float even[kFloats] = {}, odd[kFloats] = {};
  for (int k = 0; k < b.rows; ++k) {
    const float first = widened(a + 4 * k), second = widened(a + 4 * k + 2);
    for (int n = 0; n < b.row_bytes / 4; ++n) {
      even[n] = flushed(std::fma(first, widened(b.data[k] + 4 * n), even[n]));
      odd[n] = flushed(std::fma(second, widened(b.data[k] + 4 * n + 2), odd[n]));
    }
  }
  for (int n = 0; n < b.row_bytes / 4; ++n) sum[n] = flushed(flushed(sum[n]) + flushed(even[n] + odd[n]));
}

}  // namespace

bool usable() { return true; }

void configure(const Config& config) {
  if (config.palette == 0) return release();
  if (config.palette != 1) fault("there is no palette " + std::to_string(config.palette));
  for (const uint8_t byte : config.reserved)
    if (byte) fault("a reserved byte of the configuration is not 0");
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], bytes = config.row_bytes[i];
    const std::string name = "tile " + std::to_string(i);
    if (i >= kTiles && (rows || bytes)) fault("there is no " + name);
    if (rows > kRows || bytes > kRowBytes || (rows == 0) != (bytes == 0))
      fault(name + " can't have " + std::to_string(rows) + " rows of " + std::to_string(bytes) + " bytes");
  }
  configured_threads += !registers.configured;
  registers.configured = true;
  for (int i = 0; i < kTiles; ++i) {
    registers.tiles[i].rows = config.rows[i];
    registers.tiles[i].row_bytes = config.row_bytes[i];
    registers.tiles[i].clear();
  }
}

void release() {
  configured_threads -= registers.configured;
  registers = {};
}

namespace emulated {

void zero(int number) { tile(number).clear(); }

void load(int number, const void* from, int64_t stride) {
  Tile& to = tile(number);
  to.clear();
  for (int r = 0; r < to.rows; ++r)
    std::memcpy(to.data[r], static_cast<const unsigned char*>(from) + r * stride, to.row_bytes);
}

void store(int number, void* to, int64_t stride) {
  const Tile& from = tile(number);
  for (int r = 0; r < from.rows; ++r)
    std::memcpy(static_cast<unsigned char*>(to) + r * stride, from.data[r], from.row_bytes);
}

void multiply(int sum_number, int a_number, int b_number) {
  if (sum_number == a_number || sum_number == b_number || a_number == b_number)
    fault("a tile is used twice in a product");
  Tile &sum = tile(sum_number), &a = tile(a_number), &b = tile(b_number);
  if (sum.rows != a.rows || sum.row_bytes != b.row_bytes || a.row_bytes != 4 * b.rows || a.row_bytes % 4 ||
      b.row_bytes % 4)
    fault("the shapes of a product do not fit");
  for (int m = 0; m < sum.rows; ++m) multiply_row(reinterpret_cast<float*>(sum.data[m]), a.data[m], b);
  sum.clear_below();
  ++products;
}

}  // namespace emulated
}  // namespace fastdcgan::cpu::amx

extern "C" {

// Products of tiles so far, and threads that hold tiles now.
int64_t amx_emulated_products() { return fastdcgan::cpu::amx::products; }
int64_t amx_emulated_configured_threads() { return fastdcgan::cpu::amx::configured_threads; }

// What comes of one instruction, for the tests of the emulation: `config` 64 bytes, tiles of 16 rows of 64 bytes. The
// message of a fault goes to `message`, which has room for 200 characters; 0 if there is none.
int amx_emulated_product(const void* config, const void* a, const void* b, void* sum, char* message) {
  using namespace fastdcgan::cpu::amx;
  try {
    if (config) configure(*static_cast<const Config*>(config));
    load<0>(sum, kRowBytes);
    load<1>(a, kRowBytes);
    load<2>(b, kRowBytes);
    multiply<0, 1, 2>();
    store<0>(sum, kRowBytes);
    release();
    return 0;
  } catch (const std::logic_error& error) {
    std::strncpy(message, error.what(), 199);
    release();
    return 1;
  }
}

}  // extern "C"
