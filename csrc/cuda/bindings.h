// From torch's tensors to the launchers. The same bindings serve the kernels on a GPU and, compiled as C++ with
// BKD_ON_CPU, their execution on the CPU in tests/cuda_on_cpu.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <vector>

#include "../common/checks.h"
#include "launch.h"

#if !defined(BKD_ON_CPU)
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

#if defined(BKD_ON_CPU)
#define BKD_DEFINITIONS(m) STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_cuda_on_cpu, m)
#define BKD_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(bkd_fast_cuda_on_cpu, CPU, m)
#else
#define BKD_DEFINITIONS(m) STABLE_TORCH_LIBRARY_FRAGMENT(bkd_fast_cuda, m)
#define BKD_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(bkd_fast_cuda, CUDA, m)
#endif

namespace bkd {

// What the kernels compute with.
constexpr std::initializer_list<ScalarType> KERNEL_TYPES = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};

// Makes a tensor's device the current one for as long as it lives, and knows the stream that torch uses there.
class Current {
 public:
#if defined(BKD_ON_CPU)
  explicit Current(const Tensor&) : device{nullptr, 4} {}
#else
  explicit Current(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    const int index = tensor.get_device_index();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    int processors = 0;
    if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index) != cudaSuccess) {
      throw std::runtime_error("bkd_fast: the CUDA device does not say how many processors it has");
    }
    device = {stream, processors};
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
#endif
  Device device;
};

// The Python side has seen to it that there are only these three.
inline Type type_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  if (tensor.scalar_type() == ScalarType::Half) return Type::kHalf;
  if (tensor.scalar_type() == ScalarType::BFloat16) return Type::kBFloat;
  return Type::kFloat;
}
inline bool is_float(const Tensor& tensor) { return type_of(tensor) == Type::kFloat; }

// Null where there are no elements.
template <class T = void>
T* data(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}
template <class T = void>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

}  // namespace bkd
