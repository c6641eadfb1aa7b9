// Bias, shortcut and activation, compiled once for each instruction set.
#include "bias_activation.h"

#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

template <class T>
BKD_INLINE Vec<T> clamp(Vec<T> value, const BiasActivation<T>& p) {  // NaN stays
  value = value < all(p.low) ? all(p.low) : value;
  return value > all(p.high) ? all(p.high) : value;
}

template <class T>
void bias_activation(const BiasActivation<T>& p) {
  constexpr int64_t CHUNK = 16384;  // elements of a task
  constexpr int W = LANES<T>;
  const int64_t rows = max(1, CHUNK / max(1, p.length));
  in_parallel(p.parallel, parts(p.rows, rows), [&](TaskQueue& queue) {
    for (int64_t task; (task = queue.next()) >= 0;) {
      const int64_t end = min((task + 1) * rows, p.rows);
      for (int64_t row = task * rows; row < end; ++row) {
        const T* x = p.x + row * p.length;
        const T* residual = p.residual ? p.residual + row * p.length : nullptr;
        T* output = p.output + row * p.length;
        const Vec<T> bias = all(p.channels_last ? T{} : p.bias[row % p.channels]);
        int64_t i = 0;
        for (; i + W <= p.length; i += W) {
          Vec<T> value = load(x + i) + (p.channels_last ? load(p.bias + i) : bias);
          if (residual) value += load(residual + i);
          store(output + i, clamp<T>(value, p));
        }
        if (const int64_t rest = p.length - i; rest > 0) {
          Vec<T> value = load_part(x + i, rest) + (p.channels_last ? load_part(p.bias + i, rest) : bias);
          if (residual) value += load_part(residual + i, rest);
          store_part(output + i, clamp<T>(value, p), rest);
        }
      }
    }
  });
}

}  // namespace

BKD_DEFINE_KERNEL(bias_activation, BiasActivation)

}  // namespace bkd
