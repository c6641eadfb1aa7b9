#include "tier.h"

bkd::Tier bkd::avx512_tier() { return {"avx512", kernels<float>(), kernels<double>()}; }
