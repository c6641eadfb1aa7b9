// Hard shrinkage of Eq. 9, for numbers and for vectors of them.
#pragma once

#include "both.h"

namespace bkd {
namespace {

// relu(w - threshold) w / (|w - threshold| + 1e-12)
template <class V>
BKD_BOTH V shrink(V weight, V threshold) {
  const V difference = weight - threshold, zero = weight - weight;
  const V above = difference > zero ? difference : zero;
  return above * weight / ((difference > zero ? difference : -difference) + (zero + 1e-12f));
}

}  // namespace
}  // namespace bkd
