// What the kernels of a tier share: scratch memory, threads, whole parts.
#pragma once

#include <cstdint>
#include <new>

#include "kernel.h"

namespace bkd {
namespace {

inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
inline int64_t rounded(int64_t value, int64_t step) { return parts(value, step) * step; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr double LEAST_NORMS = 1e-8;  // least product of two norms in a cosine

// Aligned scratch memory, not initialised.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(::operator new((count + 16) * sizeof(T), ALIGNMENT))) {}
  ~Scratch() { ::operator delete(data_, ALIGNMENT); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  static constexpr std::align_val_t ALIGNMENT{64};
  T* data_;
};

// body(queue) on every thread; it takes tasks until there are none.
template <class Body>
void in_parallel(Parallel parallel, int64_t tasks, const Body& body) {
  if (tasks > 0)
    parallel(tasks, [](TaskQueue& queue, const void* data) { (*static_cast<const Body*>(data))(queue); }, &body);
}

}  // namespace
}  // namespace bkd
