#include "tier.h"

bkd::Tier bkd::avx2_tier() { return {"avx2", kernels<float>(), kernels<double>()}; }
