// Kernels that test the emulation of mbarrier, cp.async.bulk and wgmma.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "../../../csrc/cuda/bindings.h"
#include "../../../csrc/cuda/wgmma.cuh"

namespace bkd {
namespace {

enum class Fault { kNone, kNoFence, kAChanges, kBChanges, kNoWait, kReadEarly, kNoBarrier, kFewBytes, kOneTooMany };

// c (64, 128) += a (64, 32) b^T, b (128, 32).
template <class T>
__global__ void wgmma_kernel(const T* a, const T* b, float* c, Fault fault) {
  using B = Tile<T, 128, true>;
  unsigned char* tile = dynamic_shared();
  for (int i = threadIdx.x; i < 128 * 4; i += kWarpgroup) {
    store_shared(tile + B::chunk(i / 4, i % 4), load<uint4>(b + i * 8));
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize, first = threadIdx.x / kWarpSize * 16 + lane / 4;
  uint32_t fragments[2][4];
  float acc[16][4];
  for (int step = 0; step < 2; ++step) {
    for (int i = 0; i < 4; ++i) {
      fragments[step][i] = load<uint32_t>(a + (first + i % 2 * 8) * 32 + step * 16 + i / 2 * 8 + lane % 4 * 2);
    }
  }
  const auto each = [&](auto call) {
    for (int j = 0; j < 16; ++j) {
      for (int i = 0; i < 4; ++i) call(acc[j][i], c[(first + i / 2 * 8) * 128 + j * 8 + lane % 4 * 2 + i % 2]);
    }
  };
  each([](float& own, float& at) { own = at; });
  if (fault != Fault::kNoFence) begin_products();
  for (int step = 0; step < 2; ++step) multiply_async<T>(acc, fragments[step], descriptor(tile) + 2 * step);
  commit_products();
  if (fault == Fault::kReadEarly) each([](float& own, float& at) { at = own; });
  if (fault == Fault::kAChanges) fragments[1][3] ^= 1;
  if (fault == Fault::kBChanges && threadIdx.x == 127) tile[8191] ^= 1;
  if (fault == Fault::kBChanges) __syncthreads();
  if (fault == Fault::kNoWait) return;
  wait_for_products<0>();
  if (fault != Fault::kReadEarly) each([](float& own, float& at) { at = own; });
}

void wgmma_product(const Tensor& a, const Tensor& b, std::string fault, const Tensor& c) {
  const Fault chosen = fault == "no fence"     ? Fault::kNoFence
                       : fault == "a changes"  ? Fault::kAChanges
                       : fault == "b changes"  ? Fault::kBChanges
                       : fault == "no wait"    ? Fault::kNoWait
                       : fault == "read early" ? Fault::kReadEarly
                                               : Fault::kNone;
  const auto with = [&](auto zero) {
    using T = decltype(zero);
    launch("wgmma", &wgmma_kernel<T>, 1, 1, 1, kWarpgroup, 8192, Device{nullptr, 1}, static_cast<const T*>(data(a)),
           static_cast<const T*>(data(b)), data<float>(c), chosen);
  };
  type_of(a) == Type::kHalf ? with(Half{}) : with(BFloat{});
}

// x, reversed.
__global__ void bulk_kernel(float* x, Fault fault) {
  unsigned char* buffer = dynamic_shared();
  Barrier* barrier = reinterpret_cast<Barrier*>(buffer + 1024);
  if (threadIdx.x == 0) {
    if (fault != Fault::kNoBarrier) init_barrier(barrier, 1);
    publish_barriers();
    arrive_expecting(barrier, fault == Fault::kFewBytes ? 512 : 1024);
    if (fault == Fault::kOneTooMany) arrive(barrier);
    copy_bulk(buffer, x, 1024, barrier);
  }
  __syncthreads();
  if (fault == Fault::kNoWait) return;
  wait_for_phase(barrier, 0);
  const float value = load_shared<float>(buffer + 4 * (255 - threadIdx.x));
  __syncthreads();
  x[threadIdx.x] = value;
}

void bulk_copy(const Tensor& x, std::string fault) {
  const Fault chosen = fault == "no wait"        ? Fault::kNoWait
                       : fault == "no barrier"   ? Fault::kNoBarrier
                       : fault == "few bytes"    ? Fault::kFewBytes
                       : fault == "one too many" ? Fault::kOneTooMany
                                                 : Fault::kNone;
  launch("bulk", &bulk_kernel, 1, 1, 1, 256, 1024 + 8, Device{nullptr, 1}, data<float>(x), chosen);
}

}  // namespace
}  // namespace bkd

STABLE_TORCH_LIBRARY_FRAGMENT(cuda_on_cpu, m) {
  m.def("wgmma_product(Tensor a, Tensor b, str fault, Tensor(a!) c) -> ()");
  m.def("bulk_copy(Tensor(a!) x, str fault) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(cuda_on_cpu, CPU, m) {
  m.impl("wgmma_product", TORCH_BOX(&bkd::wgmma_product));
  m.impl("bulk_copy", TORCH_BOX(&bkd::bulk_copy));
}
