// Marks what compilers for CPUs and for CUDA devices both compile.
#pragma once

#if defined(__CUDACC__)
#define BKD_BOTH __host__ __device__ __forceinline__
#else
#define BKD_BOTH inline
#endif
