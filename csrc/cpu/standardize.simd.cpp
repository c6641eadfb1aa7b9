// Averaged and standardised features, compiled once for each instruction set. Sums are in the order of PyTorch's
// averages, row after row, so that results have their bits.
#include "standardize.h"

#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

template <class T>
BKD_INLINE void first_channels(const Standardize<T>& p, int64_t image, int64_t y) {
  const int64_t plane = p.height * p.width;
  T* output = p.output + (image * p.height + y) * p.width * p.channels;
  for (int64_t c = 0; c < p.channels; ++c) {
    const T* x = p.x + (image * p.channels + c) * plane + y * p.width;
    const T mean = p.mean[c], std = p.std[c];
    for (int64_t i = 0; i < p.width; ++i) output[i * p.channels + c] = (x[i] - mean) / std;
  }
}

// load: of a whole vector or of the last channels.
template <class T, class Load>
BKD_INLINE Vec<T> average(const T* x, int64_t pitch, int64_t channels, int64_t rows, int64_t columns, T divisor,
                          const Load& load) {
  Vec<T> sum = {};
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) sum += load(x + row * pitch + column * channels);
  return sum / all(divisor);
}

template <class T>
BKD_INLINE void last_channels(const Standardize<T>& p, int64_t image, int64_t y) {
  constexpr int W = LANES<T>;
  const int64_t radius = p.patch / 2, pitch = p.width * p.channels;
  const int64_t top = max(y - radius, 0), rows = min(y + radius, p.height - 1) - top + 1;
  for (int64_t i = 0; i < p.width; ++i) {
    const int64_t left = max(i - radius, 0), columns = min(i + radius, p.width - 1) - left + 1;
    const T divisor = static_cast<T>(p.zeros ? p.patch * p.patch : rows * columns);
    const T* x = p.x + (image * p.height + top) * pitch + left * p.channels;
    T* output = p.output + (image * p.height + y) * pitch + i * p.channels;
    int64_t c = 0;
    for (; c + W <= p.channels; c += W) {
      const Vec<T> mean = load(p.mean + c), std = load(p.std + c);
      const Vec<T> own =
          average<T>(x + c, pitch, p.channels, rows, columns, divisor, [](const T* from) { return load(from); });
      store(output + c, (own - mean) / std);
    }
    if (const int64_t rest = p.channels - c; rest > 0) {
      const Vec<T> mean = load_part(p.mean + c, rest), std = load_part(p.std + c, rest);
      const Vec<T> own = average<T>(x + c, pitch, p.channels, rows, columns, divisor,
                                    [rest](const T* from) { return load_part(from, rest); });
      store_part(output + c, (own - mean) / std, rest);
    }
  }
}

template <class T>
void standardize(const Standardize<T>& p) {
  const int64_t rows = max(1, 16384 / (p.width * p.channels));  // of a task
  in_parallel(p.parallel, parts(p.images * p.height, rows), [&](TaskQueue& queue) {
    for (int64_t task; (task = queue.next()) >= 0;)
      for (int64_t row = task * rows; row < min((task + 1) * rows, p.images * p.height); ++row)
        p.channels_first ? first_channels(p, row / p.height, row % p.height)
                         : last_channels(p, row / p.height, row % p.height);
  });
}

}  // namespace

BKD_DEFINE_KERNEL(standardize, Standardize)

}  // namespace bkd
