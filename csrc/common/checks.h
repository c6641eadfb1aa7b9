// Argument checks of registered functions. They run before anything is read or written, so that
// torch.ops.bkd_fast_native and torch.ops.bkd_fast_cuda are safe to call with any arguments. Errors name the function,
// the argument, its value and what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace bkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Integers = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

constexpr int64_t ANY = -1;  // any size
constexpr int64_t MAX_INT = 0x7fffffff;
constexpr int64_t MAX_SIGMA = 1'000'000;  // pixels

inline Integers sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}
inline std::string to_text(const Integers& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + (size == ANY ? "*" : std::to_string(size));
  return "(" + text + ")";
}

// Dense layouts; channels_last is for four dimensions.
enum class Layout { contiguous, channels_last, either };

inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  if (!tensor.numel()) return true;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}
// The layout of a dense tensor.
inline Layout layout_of(const Tensor& tensor) {
  return tensor.is_contiguous() ? Layout::contiguous : Layout::channels_last;
}
inline bool is_laid_out(const Tensor& tensor, Layout layout) {
  return (layout != Layout::channels_last && tensor.is_contiguous()) ||
         (layout != Layout::contiguous && is_channels_last(tensor));
}

class Checks {
 public:
  // first: the tensor whose device and dtype the others share; its dtype is one of `types`.
  Checks(const char* function, const char* name, const Tensor& first, std::initializer_list<ScalarType> types)
      : function_(function), device_(first.get_device_index()), cpu_(first.is_cpu()), type_(first.scalar_type()) {
    std::string expected;
    for (const ScalarType type : types) {
      if (type == type_) return;
      expected += (expected.empty() ? "" : " or ") + std::string(torch::headeronly::toString(type));
    }
    fail(name, "is " + std::string(torch::headeronly::toString(type_)), expected);
  }

  [[noreturn]] void fail(const std::string& name, const std::string& was, const std::string& expected) const {
    throw std::invalid_argument("bkd_fast: " + std::string(function_) + ": " + name + " " + was + ", expected " +
                                expected);
  }
  void that(bool holds, const std::string& name, const std::string& was, const std::string& expected) const {
    if (!holds) fail(name, was, expected);
  }

  ScalarType type() const { return type_; }

  // Check a tensor's device, dtype (by default the first tensor's), sizes (ANY: not checked) and layout.
  void tensor(const std::string& name, const Tensor& tensor, const Integers& sizes,
              Layout layout = Layout::contiguous) const {
    this->tensor(name, tensor, type_, sizes, layout);
  }
  void tensor(const std::string& name, const Tensor& tensor, ScalarType type, const Integers& sizes,
              Layout layout = Layout::contiguous) const {
    that(tensor.is_cpu() == cpu_ && tensor.get_device_index() == device_, name, "is on another device",
         "the device of the first argument");
    that(tensor.scalar_type() == type, name, "is " + std::string(torch::headeronly::toString(tensor.scalar_type())),
         torch::headeronly::toString(type));
    const Integers own = sizes_of(tensor);
    bool fits = own.size() == sizes.size();
    for (size_t i = 0; fits && i < own.size(); ++i) fits = sizes[i] == ANY || own[i] == sizes[i];
    that(fits, name, "has shape " + to_text(own), to_text(sizes));
    that(is_laid_out(tensor, layout), name, "has gaps or another order in memory",
         layout == Layout::contiguous      ? "a contiguous tensor"
         : layout == Layout::channels_last ? "channels_last"
                                           : "a contiguous or channels_last tensor");
  }
  void tensor(const std::string& name, const std::optional<Tensor>& tensor, const Integers& sizes,
              Layout layout = Layout::contiguous) const {
    if (tensor) this->tensor(name, *tensor, sizes, layout);
  }
  // An output that is skipped if it has no elements.
  void result(const std::string& name, const Tensor& tensor, const Integers& sizes,
              Layout layout = Layout::contiguous) const {
    if (tensor.numel()) this->tensor(name, tensor, sizes, layout);
  }

  void in_range(const std::string& name, int64_t value, int64_t min, int64_t max) const {
    that(value >= min && value <= max, name, "is " + std::to_string(value),
         std::to_string(min) + " to " + std::to_string(max));
  }
  void in_range(const std::string& name, double value, double min, double max) const {  // NaN fails
    that(value >= min && value <= max, name, "is " + std::to_string(value),
         std::to_string(min) + " to " + std::to_string(max));
  }
  void length(const std::string& name, size_t length, size_t expected) const {
    that(length == expected, name, "has length " + std::to_string(length), std::to_string(expected));
  }
  // Two values, one per axis.
  void pair(const std::string& name, const Integers& values, int64_t min) const {
    length(name, values.size(), 2);
    for (const int64_t value : values) in_range(name, value, min, MAX_INT);
  }
  // 16-byte alignment, for vectorized loads on GPUs.
  void aligned(const std::string& name, const Tensor& tensor) const {
    that(!tensor.numel() || reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, name,
         "does not start at a multiple of 16 bytes", "a tensor that does");
  }
  // Runs of channels are whole 16-byte chunks, so that no chunk spans two.
  void chunks(const std::string& name, const Tensor& tensor, int64_t channels) const {
    that(channels * static_cast<int64_t>(tensor.element_size()) % 16 == 0, name,
         "has runs of " + std::to_string(channels) + " channels", "whole chunks of 16 bytes");
  }
  // Dimensions from `first` on are not 0.
  void not_empty(const std::string& name, const Tensor& tensor, int64_t first) const {
    for (int64_t dim = first; dim < tensor.dim(); ++dim)
      that(tensor.size(dim) > 0, name, "has shape " + to_text(sizes_of(tensor)),
           "no size 0 from dimension " + std::to_string(first) + " on");
  }

 private:
  const char* function_;
  int32_t device_;
  bool cpu_;
  ScalarType type_;
};

}  // namespace
}  // namespace bkd
