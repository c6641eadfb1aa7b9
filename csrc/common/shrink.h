// Hard shrinkage of Eq. 9, for scalars and SIMD vectors.
#pragma once

#include "host_device.h"

namespace bkd {
namespace {

// relu(w - threshold) w / (|w - threshold| + 1e-12)
template <class V>
BKD_HOST_DEVICE V shrink(V weight, V threshold) {
  const V difference = weight - threshold, zero = weight - weight;
  const V above = difference > zero ? difference : zero;
  return above * weight / ((difference > zero ? difference : -difference) + (zero + 1e-12f));
}

}  // namespace
}  // namespace bkd
