// The distillation loss (Eq. 11-12): kernel arguments and launchers.
#pragma once

#include "pairs.h"

namespace bkd {

// One level. A vector is a pixel or a whole image. The loss is the mean of 1 - cos over vectors plus value_weight times
// the mean squared difference of all elements.
struct DistillationLoss {
  Pair pair;
  bool by_image;
  float* statistics;  // (3, vectors): dot products, squared norms of teacher, of student
  float* parts;  // by pixel (blocks, 2): 1 - cos, squared difference; by image (images, splits, 4): also the statistics
  int splits;
  float direction, value;  // factors of 1 - cos and of the squared difference
  float* loss;             // scalar
  bool add;                // accumulate into loss
};

// Number of partial sums (of 2 or 4 values) of a level.
int64_t loss_parts(const DistillationLoss& p);
void distillation_loss(const DistillationLoss& p, Type type, const Device& device);

}  // namespace bkd
