// Runs of channels: how the kernels of deformable convolution divide their work.
#pragma once

#include "deform_conv.h"
#include "work.h"

namespace bkd {
namespace {

// A run of channels that belong to one group of the weights and one group of the offsets.
struct Run {
  int64_t first, last;
};

// Runs of at most `length` channels; returns how many. Needs room for p.channels of them.
template <class T>
int64_t split_channels(const DeformConv<T>& p, int64_t length, Run* runs) {
  const int64_t part = p.channels / p.groups, share = p.channels / p.offset_groups;
  int64_t count = 0;
  for (int64_t c = 0; c < p.channels; ++count) {
    const int64_t last = least(c + length, least((c / part + 1) * part, (c / share + 1) * share));
    runs[count] = {c, last};
    c = last;
  }
  return count;
}

}  // namespace
}  // namespace bkd
