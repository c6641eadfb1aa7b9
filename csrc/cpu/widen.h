// Numbers of 16 bits as floats.
#pragma once

#include "simd.h"

namespace bkd {
namespace {

// to[0..count) = numbers of 16 bits as floats.
inline void widen_halves(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    store(to + i,
          static_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)))));
#endif
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < count; ++i) {
    // Exponent and fraction in their places make 2^-112 of the number, subnormal or not; infinity and NaN are set
    // apart.
    const uint32_t bits = (from[i] & 0x7fffu) << 13, sign = (from[i] & 0x8000u) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value *= 5.192296858534828e33f;  // 2^112
    uint32_t result;
    std::memcpy(&result, &value, sizeof result);
    if (bits >= 0x0f800000u) result = bits | 0x7f800000u;
    result |= sign;
    std::memcpy(to + i, &result, sizeof result);
  }
}
inline void widen_bfloats(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

template <class T>
void widen(const void* from, Numbers type, int64_t count, T* to) {
  if constexpr (std::is_same<T, float>::value) {
    if (type == Numbers::Half) return widen_halves(static_cast<const uint16_t*>(from), count, to);
    if (type == Numbers::BFloat) return widen_bfloats(static_cast<const uint16_t*>(from), count, to);
  }
  std::memcpy(to, from, count * sizeof(T));
}

}  // namespace
}  // namespace bkd
