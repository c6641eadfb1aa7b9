// The mean of the largest values of rows. One pass keeps the values above a threshold in a buffer; whenever the buffer
// is full, only its `count` largest values stay, and the smallest of them is the new threshold.
#include "top_mean.h"

#include "simd.h"
#include "work.h"

namespace bkd {
namespace {

constexpr int64_t MIN_SPARE = 1024;  // values that the buffer holds beyond `count`, at least

template <class T>
using Bits = std::conditional_t<std::is_same<T, float>::value, uint32_t, uint64_t>;

// Bits that are ordered as the numbers are, and back.
template <class T>
BKD_INLINE Bits<T> ordered(T value) {
  constexpr Bits<T> SIGN = Bits<T>{1} << (8 * sizeof(T) - 1);
  Bits<T> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & SIGN ? ~bits : bits | SIGN;
}
template <class T>
BKD_INLINE T number(Bits<T> bits) {
  constexpr Bits<T> SIGN = Bits<T>{1} << (8 * sizeof(T) - 1);
  bits = bits & SIGN ? bits ^ SIGN : ~bits;
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The `rank`-th largest of numbers, from 1, by a radix select: byte after byte, the highest first.
template <class T>
T ranked(const T* values, int64_t size, int64_t rank) {
  Bits<T> found = 0, known = 0;
  for (int shift = 8 * sizeof(T) - 8; shift >= 0; shift -= 8) {
    int64_t histogram[4][256] = {};  // in turn, so that an addition seldom waits for the one before it
    for (int64_t i = 0; i < size; ++i) {
      const Bits<T> bits = ordered(values[i]);
      histogram[i % 4][bits >> shift & 255] += (bits & known) == found;
    }
    int byte = 255;
    const auto equal = [&] {
      return histogram[0][byte] + histogram[1][byte] + histogram[2][byte] + histogram[3][byte];
    };
    for (; equal() < rank; --byte) rank -= equal();
    found |= Bits<T>(byte) << shift, known |= Bits<T>{255} << shift;
  }
  return number<T>(found);
}

// Leave only the `count` largest values, in any order; return the smallest of them.
template <class T>
T keep_largest(T* values, int64_t size, int64_t count) {
  const T smallest = ranked(values, size, count);
  int64_t kept = 0;
  for (int64_t i = 0; i < size; ++i)
    if (values[i] > smallest) values[kept++] = values[i];
  while (kept < count) values[kept++] = smallest;
  return smallest;
}

template <class T>
T mean_of_largest(const T* values, int64_t width, int64_t count, T* buffer, int64_t capacity) {
  constexpr int W = LANES<T>;
  // The first values fill the buffer.
  int64_t size = capacity, i = capacity;
  for (int64_t j = 0; j < size; ++j) {
    buffer[j] = values[j];
    if (values[j] != values[j]) return values[j];
  }
  T threshold = size > count ? keep_largest(buffer, size, count) : T(0);  // 0 where the buffer has the whole row
  size = count;
  // Returns false at NaN.
  const auto add = [&](T value) {
    if (value <= threshold) return true;
    if (value != value) return false;
    if (size == capacity) {
      threshold = keep_largest(buffer, size, count);
      size = count;
      if (value <= threshold) return true;
    }
    buffer[size++] = value;
    return true;
  };
  for (; i + 4 * W <= width; i += 4 * W) {
    const Vec<T> limit = all(threshold);
    const auto low = (load(values + i) <= limit) & (load(values + i + W) <= limit) &
                     (load(values + i + 2 * W) <= limit) & (load(values + i + 3 * W) <= limit);
    if (nonzero<T>(low ? Vec<T>{} : all(T(1))) == 0) continue;  // NaN is not low
    for (int64_t j = i; j < i + 4 * W; ++j)
      if (!add(values[j])) return values[j];
  }
  for (; i < width; ++i)
    if (!add(values[i])) return values[i];
  if (size > count) keep_largest(buffer, size, count);
  double sum[4] = {};
  for (int64_t j = 0; j < count; ++j) sum[j % 4] += double(buffer[j]);
  return T(((sum[0] + sum[1]) + (sum[2] + sum[3])) / double(count));
}

template <class T>
void top_mean(const TopMean<T>& p) {
  const int64_t capacity = min(p.width, p.count + max(p.count, MIN_SPARE));
  in_parallel(p.parallel, p.rows, [&](TaskQueue& queue) {
    Scratch<T> buffer(capacity);
    for (int64_t row; (row = queue.next()) >= 0;)
      p.mean[row] = mean_of_largest<T>(p.values + row * p.width, p.width, p.count, buffer, capacity);
  });
}

}  // namespace

BKD_DEFINE_KERNEL(top_mean, TopMean)

}  // namespace bkd
