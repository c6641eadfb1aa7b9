// Kernels that test the emulation itself: it must catch undefined behaviour and multiply tiles correctly.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "../../../csrc/cuda/bindings.h"
#include "../../../csrc/cuda/tile.cuh"

namespace bkd {
namespace {

using Values = float[64];

__global__ void mirror_kernel(float* x, bool barrier) {
  BKD_SHARED(Values, shared);
  shared[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();
  x[threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void divergent_kernel(float* x) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    x[threadIdx.x] = 1;
    __syncthreads();
  }
}

__global__ void early_end_kernel(float*) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
}

__global__ void half_a_warp_kernel(float* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = sum_lanes(x[threadIdx.x]);
}

__global__ void copy_kernel(float* x, bool wait) {
  unsigned char* buffer = dynamic_shared();
  const int at = threadIdx.x * 16;
  copy_async(buffer + at, x + threadIdx.x * 4, threadIdx.x % 2 == 0);
  commit_copies();
  copy_async(buffer + 1024 + at, x + threadIdx.x * 4, true);
  commit_copies();
  if (wait) wait_for_copies<1>();
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    const float first = *reinterpret_cast<float*>(buffer + at + 4 * i),
                second = *reinterpret_cast<float*>(buffer + 1024 + at + 4 * i);
    x[threadIdx.x * 4 + i] = second == second ? -1 : first;  // data must not arrive before its wait
  }
}

__global__ void warp_kernel(float* x) {
  const int lane = threadIdx.x % 32;
  const uint32_t odd = __ballot_sync(kAll, lane % 2 == 1);
  const float next = __shfl_sync(kAll, x[threadIdx.x], lane + 1);
  const float down = __shfl_down_sync(kAll, x[threadIdx.x], 30);
  __syncwarp();
  const bool any = __syncthreads_or(threadIdx.x == 5), none = __syncthreads_or(false);
  x[threadIdx.x] = odd == 0xaaaaaaaau && any && !none ? 100 * next + down : -1;
}

void run(std::string name, const Tensor& x) {
  float* values = data<float>(x);
  const Device device{nullptr, 1};
  if (name == "mirror") return launch("mirror", &mirror_kernel, 1, 1, 1, 64, 0, device, values, true);
  if (name == "no barrier") return launch("mirror", &mirror_kernel, 1, 1, 1, 64, 0, device, values, false);
  if (name == "divergent") return launch("divergent", &divergent_kernel, 1, 1, 1, 64, 0, device, values);
  if (name == "early end") return launch("early end", &early_end_kernel, 1, 1, 1, 64, 0, device, values);
  if (name == "half a warp") return launch("half a warp", &half_a_warp_kernel, 1, 1, 1, 32, 0, device, values);
  if (name == "copy") return launch("copy", &copy_kernel, 1, 1, 1, 64, 2048, device, values, true);
  if (name == "no wait") return launch("copy", &copy_kernel, 1, 1, 1, 64, 2048, device, values, false);
  if (name == "warp") return launch("warp", &warp_kernel, 1, 1, 1, 64, 0, device, values);
  if (name == "too many") return launch("mirror", &mirror_kernel, int64_t{1} << 31, 1, 1, 64, 0, device, values, true);
  throw std::runtime_error("no such kernel");
}

// c (64, 64) = a b; a and b are (64, depth) if stored by rows, else (depth, 64).
template <class T, bool kTensor, bool kARows, bool kBRows>
__global__ void product_kernel(const T* a, const T* b, float* c, int depth) {
  using A = Tile<T, 64, kARows>;
  using B = Tile<T, 64, kBRows>;
  struct Shared {
    unsigned char a[A::kBytes], b[B::kBytes];
  };
  BKD_SHARED(Shared, shared);
  AccumulatorFragment<64, 64> acc;
  acc.clear();
  const LaneOffsets<A, B, AccumulatorFragment<64, 64>> lane;
  for (int first = 0; first < depth; first += kDepth<T>) {
    __syncthreads();
    for (int i = threadIdx.x; i < 64 * kDepth<T> / kVector<T>; i += kThreads) {
      auto copy = [&](unsigned char* tile, const T* from, bool rows, int (*chunk)(int, int)) {
        const int wide = (rows ? kDepth<T> : 64) / kVector<T>, row = i / wide, column = i % wide;
        const T* source =
            rows ? from + row * depth + first + column * kVector<T> : from + (first + row) * 64 + column * kVector<T>;
        store_shared(tile + chunk(row, column), load<uint4>(source));
      };
      copy(shared.a, a, kARows, &A::chunk);
      copy(shared.b, b, kBRows, &B::chunk);
    }
    __syncthreads();
    multiply_tiles<T, kTensor, A, B>(acc, lane, shared.a, shared.b);
  }
  acc.pairs([&](int row, int column, float x, float y) {
    c[row * 64 + column] = x;
    c[row * 64 + column + 1] = y;
  });
}

void product(const Tensor& a, const Tensor& b, bool a_rows, bool b_rows, bool tensor, const Tensor& c) {
  const int depth = static_cast<int>(a.numel() / 64);
  dispatch(type_of(a), [&](auto zero) {
    using T = decltype(zero);
    auto with = [&](auto kernel) {
      launch("product", kernel, 1, 1, 1, kThreads, 0, Device{nullptr, 1}, static_cast<const T*>(data(a)),
             static_cast<const T*>(data(b)), data<float>(c), depth);
    };
    if (tensor) {
      a_rows ? (b_rows ? with(&product_kernel<T, true, true, true>) : with(&product_kernel<T, true, true, false>))
             : (b_rows ? with(&product_kernel<T, true, false, true>) : with(&product_kernel<T, true, false, false>));
    } else {
      a_rows ? (b_rows ? with(&product_kernel<T, false, true, true>) : with(&product_kernel<T, false, true, false>))
             : (b_rows ? with(&product_kernel<T, false, false, true>) : with(&product_kernel<T, false, false, false>));
    }
  });
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_on_cpu, m) {
  m.def("run(str name, Tensor(a!) x) -> ()");
  m.def("product(Tensor a, Tensor b, bool a_rows, bool b_rows, bool tensor, Tensor(a!) c) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(cuda_on_cpu, CPU, m) {
  m.impl("run", TORCH_BOX(&bkd::run));
  m.impl("product", TORCH_BOX(&bkd::product));
}
