// The distillation loss (Eq. 11-12): what its kernels are given, and how they are started.
#pragma once

#include "pairs.h"

namespace bkd {

// One level. A pixel or a whole image is a vector; the loss is the mean of their 1 - cos, and value_weight times the
// mean squared difference of all numbers.
struct DistillationLoss {
  Pair pair;
  bool by_image;
  float* statistics;  // (3, vectors): dot products, squared norms of teacher, of student
  float* parts;  // by pixel (blocks, 2): 1 - cos, squared difference; by image (images, splits, 4): also the statistics
  int splits;
  float direction, value;  // what 1 - cos of a vector, and a squared difference, count in the loss
  float* loss;             // one number
  bool add;                // to what it holds
};

// How many parts (of 2 or of 4 numbers) a level has.
int64_t loss_parts(const DistillationLoss& p);
void distillation_loss(const DistillationLoss& p, Type type, const Device& device);

}  // namespace bkd
