// Integer arithmetic, comparison, logic and bits.
#include <type_traits>

#include "warp.h"

namespace ptx {
namespace {

// The type of twice as many bits.
template <class T> struct Double;
template <> struct Double<uint16_t> { using type = uint32_t; };
template <> struct Double<int16_t> { using type = int32_t; };
template <> struct Double<uint32_t> { using type = uint64_t; };
template <> struct Double<int32_t> { using type = int64_t; };
template <> struct Double<uint64_t> { using type = unsigned __int128; };
template <> struct Double<int64_t> { using type = __int128; };

constexpr auto add = [](auto a, auto b) { return a + b; };
constexpr auto sub = [](auto a, auto b) { return a - b; };
constexpr auto mul = [](auto a, auto b) { return a * b; };
constexpr auto mad = [](auto a, auto b, auto c) { return a * b + c; };
constexpr auto min = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto max = [](auto a, auto b) { return a < b ? b : a; };
constexpr auto both = [](auto a, auto b) { return a & b; };
constexpr auto either = [](auto a, auto b) { return a | b; };
constexpr auto differ = [](auto a, auto b) { return a ^ b; };
constexpr auto invert = [](auto a) { return ~a; };
constexpr auto negate = [](auto a) { return -a; };
constexpr auto absolute = [](auto a) { return a < 0 ? -a : a; };
// By zero the manual leaves the result open.
constexpr auto div = []<class T>(T a, T b) -> T { return b == 0 ? T(-1) : b == T(-1) && std::is_signed_v<T> ? T(-a) : T(a / b); };
constexpr auto rem = []<class T>(T a, T b) -> T { return b == 0 ? a : b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b); };
constexpr auto mul_hi = []<class T>(T a, T b) -> T {
  using D = typename Double<T>::type;
  return static_cast<T>(D(a) * D(b) >> 8 * sizeof(T));
};
// Shifts by more than there are bits give zero, or the sign.
constexpr auto shl = []<class T>(T a, uint32_t n) -> T { return n >= 8 * sizeof(T) ? T(0) : T(a << n); };
constexpr auto shr = []<class T>(T a, uint32_t n) -> T {
  return n < 8 * sizeof(T) ? T(a >> n) : std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
};
constexpr auto bfe = []<class T>(T a, uint32_t from, uint32_t length) -> T {
  constexpr uint32_t bits = 8 * sizeof(T);
  from &= 255, length &= 255;
  if (length == 0) return 0;
  const uint32_t top = from + length - 1 < bits - 1 ? from + length - 1 : bits - 1;
  const bool sign = std::is_signed_v<T> && (a >> top & 1);
  T found = 0;
  for (uint32_t k = 0; k < bits; ++k) {
    const bool bit = k < length && from + k < bits ? (a >> (from + k) & 1) : sign;
    found = T(found | T(T(bit) << k));
  }
  return found;
};
constexpr auto bfi = []<class T>(T a, T b, uint32_t to, uint32_t length) -> T {
  constexpr uint32_t bits = 8 * sizeof(T);
  to &= 255, length &= 255;
  for (uint32_t k = 0; k < length && to + k < bits; ++k) b = (b & ~(T(1) << (to + k))) | ((a >> k & 1) << (to + k));
  return b;
};
constexpr auto popc = [](auto a) { return uint32_t(std::popcount(a)); };
constexpr auto clz = [](auto a) { return uint32_t(std::countl_zero(a)); };
constexpr auto brev = []<class T>(T a) -> T {
  T found = 0;
  for (size_t k = 0; k < 8 * sizeof(T); ++k) found |= (a >> k & 1) << (8 * sizeof(T) - 1 - k);
  return found;
};
// The highest bit that isn't the sign's, or how far it is from the top; -1 where there is none.
template <bool from_top>
constexpr auto bfind = []<class T>(T a) -> uint32_t {
  const auto bits = static_cast<std::make_unsigned_t<T>>(std::is_signed_v<T> && a < 0 ? ~a : a);
  if (bits == 0) return ~0u;
  const uint32_t top = std::countl_zero(bits);
  return from_top ? top : 8 * sizeof(T) - 1 - top;
};
constexpr auto prmt = [](uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t found = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t pick = select >> 4 * k & 15;
    uint32_t byte = bytes >> 8 * (pick & 7) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    found |= byte << 8 * k;
  }
  return found;
};
constexpr auto lop3 = [](uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t found = 0;
  for (uint32_t k = 0; k < 8; ++k) {
    if (table >> k & 1) found |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
  }
  return found;
};
// Of a (low) and b (high) together; .clamp, or .wrap
template <bool left, bool wrap>
constexpr auto funnel = [](uint32_t a, uint32_t b, uint32_t n) {
  n = wrap ? n & 31 : n < 32 ? n : 32;
  const uint64_t both_words = uint64_t{b} << 32 | a;
  return static_cast<uint32_t>(left ? both_words << n >> 32 : both_words >> n);
};

// F of operands that all have the type of the result.
template <auto F, class T>
Run same(Written& n, int operands) {
  n.expect(operands + 1);
  constexpr auto f = []<class... A>(A... a) { return static_cast<T>(F(a...)); };
  if constexpr (requires { F(T{}); }) {
    return lanewise<f, T, T>;
  } else if constexpr (requires { F(T{}, T{}); }) {
    return lanewise<f, T, T, T>;
  } else {
    return lanewise<f, T, T, T, T>;
  }
}
template <auto F>
Make of_integers(int operands) {
  return [=](Written& n, Instruction&) {
    return for_integer(n.take_last(), [&]<class T>(Type<T>) -> Run { return same<F, T>(n, operands); });
  };
}

// --- predicates: a bit for each lane

template <auto F>
void logic(Warp& w, const Instruction& i) {
  w.put_mask(i.at[0], F(w.mask(i.at[1]), w.mask(i.at[2])), w.poison[i.at[1]] | w.poison[i.at[2]]);
}
void logic_not(Warp& w, const Instruction& i) { w.put_mask(i.at[0], ~w.mask(i.at[1]), w.poison[i.at[1]]); }

template <auto F>
Make of_bits() {
  return [](Written& n, Instruction&) -> Run {
    const std::string type = n.take_last();
    if (type == "pred") {
      n.expect(3);
      return logic<F>;
    }
    return for_integer(type, [&]<class T>(Type<T>) -> Run { return same<F, T>(n, 2); });
  };
}

template <class T>
Run product(Written& n, bool adds) {
  using D = typename Double<T>::type;
  n.expect(adds ? 4 : 3);
  if (n.take("wide")) {
    if constexpr (sizeof(T) < 8) {
      if (adds) return lanewise<[](T a, T b, D c) -> D { return D(a) * D(b) + c; }, D, T, T, D>;
      return lanewise<[](T a, T b) -> D { return D(a) * D(b); }, D, T, T>;
    }
    return nullptr;
  }
  if (n.take("hi")) {
    if (adds) return lanewise<[](T a, T b, T c) -> T { return T(mul_hi(a, b) + c); }, T, T, T, T>;
    return lanewise<mul_hi, T, T, T>;
  }
  n.take("lo");
  return adds ? same<mad, T>(n, 3) : same<mul, T>(n, 2);
}
Make of_products(bool adds) {
  return [=](Written& n, Instruction&) {
    return for_integer(n.take_last(), [&]<class T>(Type<T>) -> Run {
      if constexpr (sizeof(T) >= 2) return product<T>(n, adds);
      return nullptr;
    });
  };
}

// Of two numbers of 16 bits, .s16x2 or .u16x2
uint32_t add_two(uint32_t a, uint32_t b) { return ((a & 0xffff0000) + (b & 0xffff0000)) | ((a + b) & 0xffff); }

// d = f(a of the instruction's type, u32...)
template <auto F, class... U>
Make of_one() {
  return [](Written& n, Instruction&) {
    return for_integer(n.take_last(), [&]<class T>(Type<T>) -> Run {
      n.expect(2 + sizeof...(U));
      return lanewise<F, T, T, U...>;
    });
  };
}

template <auto F>
Make of_counts() {
  return [](Written& n, Instruction&) -> Run {
    n.expect(2);
    const std::string type = n.take_last();
    if (type == "b32") return lanewise<F, uint32_t, uint32_t>;
    if (type == "b64") return lanewise<F, uint32_t, uint64_t>;
    return nullptr;
  };
}

}  // namespace

void make_integers(Makers& all) {
  all["add"] = [of_one = of_integers<add>(2)](Written& n, Instruction& i) -> Run {
    if (!n.take("s16x2") && !n.take("u16x2")) return of_one(n, i);
    n.expect(3);
    return lanewise<add_two, uint32_t, uint32_t, uint32_t>;
  };
  all["sub"] = of_integers<sub>(2);
  all["min"] = of_integers<min>(2);
  all["max"] = of_integers<max>(2);
  all["div"] = of_integers<div>(2);
  all["rem"] = of_integers<rem>(2);
  all["neg"] = of_integers<negate>(1);
  all["abs"] = of_integers<absolute>(1);
  all["mul"] = of_products(false);
  all["mad"] = of_products(true);
  all["and"] = of_bits<both>();
  all["or"] = of_bits<either>();
  all["xor"] = of_bits<differ>();
  all["not"] = [](Written& n, Instruction&) -> Run {
    const std::string type = n.take_last();
    if (type == "pred") {
      n.expect(2);
      return logic_not;
    }
    return for_integer(type, [&]<class T>(Type<T>) -> Run { return same<invert, T>(n, 1); });
  };
  all["shl"] = of_one<shl, uint32_t>();
  all["shr"] = of_one<shr, uint32_t>();
  all["bfe"] = of_one<bfe, uint32_t, uint32_t>();
  all["brev"] = of_one<brev>();
  all["bfi"] = [](Written& n, Instruction&) -> Run {
    n.expect(5);
    const std::string type = n.take_last();
    if (type == "b32") return lanewise<bfi, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>;
    if (type == "b64") return lanewise<bfi, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>;
    return nullptr;
  };
  all["popc"] = of_counts<popc>();
  all["clz"] = of_counts<clz>();
  all["bfind"] = [](Written& n, Instruction&) {
    n.expect(2);
    const bool from_top = n.take("shiftamt");
    return for_integer(n.take_last(), [&]<class T>(Type<T>) -> Run {
      return from_top ? lanewise<bfind<true>, uint32_t, T> : lanewise<bfind<false>, uint32_t, T>;
    });
  };
  all["prmt"] = [](Written& n, Instruction&) -> Run {
    n.expect(4);
    return n.take("b32") ? lanewise<prmt, uint32_t, uint32_t, uint32_t, uint32_t> : Run{};
  };
  all["lop3"] = [](Written& n, Instruction&) -> Run {
    n.expect(5);
    return n.take("b32") ? lanewise<lop3, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t> : Run{};
  };
  all["shf"] = [](Written& n, Instruction&) -> Run {
    n.expect(4);
    const bool left = n.take("l") || !n.take("r"), wrap = n.take("wrap") || !n.take("clamp");
    if (!n.take("b32")) return nullptr;
    const Run runs[2][2] = {
        {lanewise<funnel<false, false>, uint32_t, uint32_t, uint32_t, uint32_t>,
         lanewise<funnel<false, true>, uint32_t, uint32_t, uint32_t, uint32_t>},
        {lanewise<funnel<true, false>, uint32_t, uint32_t, uint32_t, uint32_t>,
         lanewise<funnel<true, true>, uint32_t, uint32_t, uint32_t, uint32_t>}};
    return runs[left][wrap];
  };
}

}  // namespace ptx
