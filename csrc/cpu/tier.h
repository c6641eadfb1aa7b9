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
  return {deform_conv<T>,      deform_conv_backward<T>, deform_gather<T>,          deform_gather_backward<T>,
          memory_attention<T>, memory_attention_backward<T>, distances<T>,         anomaly_map<T>,
          distances_backward<T>, distillation_loss<T>,  distillation_loss_backward<T>, local_match<T>};
}

}  // namespace
}  // namespace bkd
