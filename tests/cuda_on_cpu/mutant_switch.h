// Many changes of the kernels in one program: `mutants.py` writes them all into its sources, and MUTANT in the
// environment says which one is made, by its number. Compiled before everything else.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

namespace mutant {

constexpr int kMost = 1 << 13;

inline int number_of(const char* name) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : 0;
}
inline const int active = number_of("MUTANT");
inline std::atomic<bool> reached[kMost];  // since the last report; no race, and it orders nothing

__attribute__((always_inline)) inline bool is(int number) {
  reached[number].store(true, std::memory_order_relaxed);
  return active == number;
}

// Whether test number `number` of the program is among those that MUTANT_CASES lists, separated by commas (unset: all).
inline bool selected(int number) {
  static const char* const list = std::getenv("MUTANT_CASES");
  if (list == nullptr) return true;
  for (const char* at = list; *at != 0;) {
    char* end;
    if (std::strtol(at, &end, 10) == number) return true;
    at = *end == ',' ? end + 1 : end;
  }
  return false;
}

// Prints the numbers of the changes whose place was reached since the last report, where MUTANT_REPORT is set.
inline void report(int test, double milliseconds) {
  static const bool wanted = number_of("MUTANT_REPORT") != 0;
  if (!wanted) return;
  std::printf("reached %d %.3f", test, milliseconds);
  for (int i = 0; i < kMost; ++i)
    if (reached[i].exchange(false, std::memory_order_relaxed)) std::printf(" %d", i);
  std::printf("\n");
}

// `a + Infix<17>() + b` is a + b, or what change 17 makes of it. Whatever stands around it, that has the precedence of
// the operator, and its operands are those that it had.
template <int kNumber>
struct Infix {};
template <int kNumber, class A>
struct Left {
  A&& a;
};
#define MUTANT_INFIX(op, other)                                                              \
  template <int n, class A>                                                                  \
  __attribute__((always_inline)) inline auto operator op(A&& a, Infix<n>) {                  \
    return Left<n, A>{static_cast<A&&>(a)};                                                  \
  }                                                                                          \
  template <int n, class A, class B>                                                         \
  __attribute__((always_inline)) inline auto operator op(Left<n, A> left, B&& b) {           \
    return is(n) ? left.a other b : left.a op b;                                             \
  }
MUTANT_INFIX(+, -)
MUTANT_INFIX(-, +)
MUTANT_INFIX(*, +)
MUTANT_INFIX(/, *)
MUTANT_INFIX(%, /)
MUTANT_INFIX(<, <=)
MUTANT_INFIX(<=, <)
MUTANT_INFIX(>, >=)
MUTANT_INFIX(>=, >)
MUTANT_INFIX(==, !=)
MUTANT_INFIX(!=, ==)
#undef MUTANT_INFIX

template <class B>
__attribute__((always_inline)) inline auto negative(const B& b) {
  if constexpr (std::is_unsigned_v<B>)
    return -static_cast<int64_t>(b);
  else
    return -b;
}

// `a += Assigned<17>() += b`, also with -=
template <int kNumber>
struct Assigned {};
template <int n, class B>
__attribute__((always_inline)) inline auto operator+=(Assigned<n>, B&& b) {
  return is(n) ? negative(b) : b;
}
template <int n, class B>
__attribute__((always_inline)) inline auto operator-=(Assigned<n>, B&& b) {
  return is(n) ? negative(b) : b;
}

// `Negated<17>()->*b` is -b, or b.
template <int kNumber>
struct Negated {};
template <int n, class B>
__attribute__((always_inline)) inline auto operator->*(Negated<n>, B&& b) {
  return is(n) ? b : -b;
}

}  // namespace mutant
