// Mean and sum of squared deviations of a set of values, and of two sets together (Chan, Golub and LeVeque, "Updating
// Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979). Needs no torch.
#pragma once

#include "common/activations.h"

namespace fastdcgan {

template <class T>
struct Moments {
  T count = 0;
  T mean = 0;
  T m2 = 0;  // sum of (value - mean)^2

  // From sums of d = value - shift.
  static FASTDCGAN_INLINE Moments from_sums(T count, T shift, T sum, T sum_of_squares) {
    const T offset = sum / count;
    return {count, shift + offset, sum_of_squares - offset * sum};
  }

  FASTDCGAN_INLINE void merge(const Moments& other) {
    const T total = count + other.count;
    const T weight = total > 0 ? other.count / total : 0;
    const T delta = other.mean - mean;
    mean += delta * weight;
    m2 += other.m2 + delta * delta * count * weight;
    count = total;
  }
};

}  // namespace fastdcgan
