// Bindings: torch tensors to kernel launchers. With BKD_ON_CPU the same code binds the kernels that tests/cuda_on_cpu
// runs on the CPU.
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

#if defined(BKD_ON_CPU)
#include "device.h"
#else
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

// The element types that the kernels support.
constexpr std::initializer_list<ScalarType> KERNEL_TYPES = {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16};

// Makes a tensor's device current during its lifetime, and holds torch's current stream there.
class Current {
 public:
#if defined(BKD_ON_CPU)
  explicit Current(const Tensor&)
      : device{nullptr, emulated::multiprocessors, emulated::shared_bytes, emulated::shared_bytes - 1024} {}
#else
  explicit Current(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    const int index = tensor.get_device_index();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    const auto attribute = [&](cudaDeviceAttr name) {
      int value = 0;
      if (cudaDeviceGetAttribute(&value, name, index) == cudaSuccess) return value;
      throw std::runtime_error("bkd_fast: cannot query the multiprocessors and shared memory of the CUDA device");
    };
    device = {stream, attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
              attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
#endif
  Device device;
};

// Checks allow KERNEL_TYPES only.
inline Type type_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  if (tensor.scalar_type() == ScalarType::Half) return Type::kHalf;
  if (tensor.scalar_type() == ScalarType::BFloat16) return Type::kBFloat;
  return Type::kFloat;
}
inline bool is_float(const Tensor& tensor) { return type_of(tensor) == Type::kFloat; }

// Null for a tensor without elements.
template <class T = void>
T* data(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}
template <class T = void>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

}  // namespace bkd
