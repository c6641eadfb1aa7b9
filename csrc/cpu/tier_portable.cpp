#include "tier.h"

bkd::Tier bkd::portable_tier() { return {"portable", kernels<float>(), kernels<double>()}; }
