// The geometry of a convolution, for the bindings of both deformable operators.
#pragma once

#include "../common/geometry.h"
#include "dispatch.h"

namespace bkd {
namespace {

template <class Problem>
void set_geometry(const Geometry& geometry, Problem& p) {
  p.threads = torch::stable::get_num_threads();
  for (int axis = 0; axis < 2; ++axis) {
    p.kernel[axis] = geometry.kernel[axis];
    p.stride[axis] = geometry.stride[axis];
    p.padding[axis] = geometry.padding[axis];
    p.dilation[axis] = geometry.dilation[axis];
  }
}

}  // namespace
}  // namespace bkd
