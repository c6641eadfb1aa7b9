// Gradients of cosine and squared distances with respect to a teacher and all its students, in one pass.
#include "pairs.cuh"

namespace bkd {
namespace {

constexpr int kThreads = 256;

// A thread has kCount elements of one vector: 16 bytes of channels (channels-last), or one (channels-first).
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) pair_gradient_kernel(const PairGradient p) {
  using Vector = Vec<T, kCount>;
  const Pair& pair = p.pair;
  const int64_t at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kCount,
                image_size = int64_t{pair.channels} * pair.pixels;
  if (at >= pair.images * image_size) return;
  const int64_t image = at / image_size;
  int64_t vector = image;
  if (!p.by_image) vector = kCount == 1 ? image * pair.pixels + at % pair.pixels : at / pair.channels;
  const float grad = load<float>(p.grad + (p.one_grad ? 0 : vector));
  const Vector teacher = load<Vector>(static_cast<const T*>(pair.teacher) + at);
  float grad_teacher[kCount] = {};
#pragma unroll
  for (int b = 0; b < kMaxBranches; ++b) {
    if (b >= pair.branches) break;
    const float* statistics = p.statistics + 3 * b * p.vectors + vector;
    const float dot = load<float>(statistics), t_square = load<float>(statistics + p.vectors);
    const float s_square = load<float>(statistics + 2 * p.vectors), norms = sqrtf(t_square * s_square);
    const float slope = -grad * p.direction[b] / fmaxf(norms, kEpsilon), value = 2 * grad * p.value[b];
    const bool regular = norms > kEpsilon;  // a clamped norm has no gradient
    const float along_t = regular ? dot / fmaxf(t_square, kEpsilon * kEpsilon) : 0;
    const float along_s = regular ? dot / fmaxf(s_square, kEpsilon * kEpsilon) : 0;
    const Vector student = load<Vector>(static_cast<const T*>(pair.student[b]) + at);
    Vector grad_student;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float t = wide(teacher.value[i]), s = wide(student.value[i]);
      grad_teacher[i] += slope * (s - along_t * t) + value * (t - s);
      grad_student.value[i] = narrow<T>(slope * (t - along_s * s) - value * (t - s));
    }
    if (p.grad_student[b]) store(static_cast<T*>(p.grad_student[b]) + at, grad_student);
  }
  if (!p.grad_teacher) return;
  T* to = static_cast<T*>(p.grad_teacher) + at;
  Vector result = p.add ? load<Vector>(to) : Vector{};
#pragma unroll
  for (int i = 0; i < kCount; ++i) result.value[i] = narrow<T>(grad_teacher[i] + (p.add ? wide(result.value[i]) : 0));
  store(to, result);
}

template <class T, int kCount>
void start(const PairGradient& p, const Device& device) {
  launch("pair_gradient", &pair_gradient_kernel<T, kCount>,
         blocks_for(p.pair.vectors() * p.pair.channels, kThreads * kCount), 1, 1, kThreads, 0, device, p);
}

}  // namespace

void pair_gradient(const PairGradient& p, Type type, const Device& device) {
  dispatch(type, [&](auto zero) {
    using T = decltype(zero);
    p.pair.channels_first ? start<T, 1>(p, device) : start<T, Pack<T>::kCount>(p, device);
  });
}

}  // namespace bkd
