// All kernels for the instruction set that this file is compiled for.
#pragma once

#include "anomaly_map.h"
#include "deform_conv.h"
#include "deform_conv_backward.h"
#include "deform_gather.h"
#include "distillation_loss.h"
#include "local_match.h"
#include "memory_attention.h"
#include "memory_attention_backward.h"

namespace bkd {
namespace {

template <class T>
Kernels<T> kernels() {
  Kernels<T> k{};
  k.deform_conv = deform_conv<T>;
  k.deform_conv_backward = deform_conv_backward<T>;
  k.deform_gather = deform_gather<T>;
  k.deform_gather_backward = deform_gather_backward<T>;
  k.memory_attention = memory_attention<T>;
  k.memory_attention_backward = memory_attention_backward<T>;
  k.distances = distances<T>;
  k.anomaly_map = anomaly_map<T>;
  k.distances_backward = distances_backward<T>;
  k.distillation_loss = distillation_loss<T>;
  k.distillation_loss_backward = distillation_loss_backward<T>;
  k.local_match = local_match<T>;
  return k;
}

}  // namespace
}  // namespace bkd
